//! Where log lines go and in which form: standard error, one line an event, as text or JSON.

use clap::ValueEnum;
use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// The form of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

/// Starts logging. `verbose` 0 is info, 1 debug of our own, 2 debug of everything.
pub fn start(format: Format, verbose: u8) {
    let filter = match verbose {
        // The client logs every failed request; whoever made it says so once, and when it is over.
        0 => Targets::new()
            .with_default(Level::WARN)
            .with_target("cloudcore", Level::INFO)
            .with_target("kube_client", LevelFilter::OFF),
        1 => Targets::new().with_default(Level::INFO).with_target("cloudcore", Level::DEBUG),
        _ => Targets::new().with_default(Level::DEBUG),
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(verbose > 0);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        Format::Text => registry.with(layer).try_init(),
        Format::Json => registry.with(layer.json()).try_init(),
    };
    // Only a second start in one process fails, and then lines go where the first one said.
    drop(started);
}
