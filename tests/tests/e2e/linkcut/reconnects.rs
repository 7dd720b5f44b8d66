//! Links that break at any moment and in any way, again and again: in the end there is one session, and no more of anything than before.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::wait::until;
use skerry_tests::{network, procfs};

use crate::replicas::sessions;
use crate::world::{World, seeded, story};

/// A session that was not told of its end has its ping for news answered within 5 s, or it ends.
const UNANSWERED: Duration = Duration::from_secs(6);
/// What edgecore says when a session has ended.
const LOST: &str = "no session with the cloud";

/// What is done to a line.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// What is connected is reset; over QUIC it is lost without a word.
    Reset,
    /// The next connection too, once it has carried so many bytes: in the middle of TLS, of a Hello, of what is sent then.
    Early(u64),
    /// All is swallowed for a moment, so many milliseconds after the next connection has begun.
    Stuck(u64),
    /// Nothing listens for a moment.
    Closed,
    /// All is swallowed until whoever has a session has asked whether it lives.
    Silence,
}

/// What must not grow. Of memory what is no file's: code comes and goes as it is used.
#[derive(Debug)]
struct Had {
    descriptors: usize,
    threads: usize,
    memory_kb: u32,
    cloud_descriptors: usize,
    cloud_tasks: f64,
}

#[test]
fn dozens_of_reconnects_leave_one_session_and_nothing_else() -> Result<()> {
    story("linkcut-reconnects", |world| reconnect_often(world, 20, 4, 4))
}

#[test]
#[ignore = "minutes: scripts/soak link"]
fn a_thousand_reconnects_leave_one_session_and_nothing_else() -> Result<()> {
    let count: u64 = std::env::var("RECONNECTS").map_or(Ok(1000), |count| count.parse())?;
    // Over QUIC most take 6 s, for nobody says that a session is over.
    let quic = count / 20;
    story("linkcut-thousand", |world| reconnect_often(world, count - quic, quic, 30))
}

/// So many reconnects over each transport, after some that warm up.
fn reconnect_often(world: &mut World, websocket: u64, quic: u64, warm: u64) -> Result<()> {
    let node = world.edge.name().to_owned();
    let mut dice = seeded()?;
    world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
    let containers = world.running()?;
    for (transport, count) in [("websocket", websocket), ("quic", quic)] {
        world.carry_over(transport)?;
        let over_quic = transport == "quic";
        // What the allocator keeps of the first ones it uses for the others.
        reconnect(world, &mut dice, over_quic, warm.min(count.div_ceil(5)))?;
        rest(world)?;
        let (before, epoch, logged) = (usually_has(world)?, world.session()?.1, world.edge.log_text().len());
        let begin = Instant::now();
        let cuts = reconnect(world, &mut dice, over_quic, count)?;
        let took = begin.elapsed();
        rest(world)?;
        ensure!(world.session()?.1 > epoch, "the epoch did not rise");
        let back = || {
            let now = has(world)?;
            Ok(now.descriptors <= before.descriptors
                && now.threads <= before.threads
                && now.memory_kb < before.memory_kb + MARGIN_KB
                && now.cloud_descriptors <= before.cloud_descriptors
                && now.cloud_tasks <= before.cloud_tasks)
        };
        until("all to be as it was", 60, back).with_context(|| format!("before: {before:?}; now: {:?}", has(world)))?;
        eprintln!(
            "{count} reconnects over {transport} in {took:?} by {cuts:?}; before: {before:?}; after: {:?}",
            has(world)?
        );
        let log = world.edge.log_text();
        let trouble = log[logged..].lines().find(|line| line.contains(" ERROR "));
        ensure!(trouble.is_none(), "edgecore had trouble: {trouble:?}");
    }
    ensure!(world.running()? == containers, "containers changed: {containers:?} {:?}", world.running());
    world.wait_ready("app=sleeper", 2).map(drop)
}

/// The heap goes up and down by a tenth of it. Nine hundred connections that each left little more than a kilobyte would leave more.
const MARGIN_KB: u32 = 1024;

/// Cuts the line until there were so many connections more; how often how, and how long the next connection took.
fn reconnect(
    world: &World,
    dice: &mut StdRng,
    over_quic: bool,
    count: u64,
) -> Result<BTreeMap<&'static str, (u32, Duration)>> {
    let first = world.relay.connections();
    let mut cuts = BTreeMap::<_, (u32, Duration)>::new();
    while world.relay.connections() < first + count {
        // Over QUIC a session outlives what is closed or silent for a moment.
        // One that has no answer to its Hello yet asks nobody whether it lives: bytes end in its handshake, mostly.
        let (kinds, bytes) = if over_quic { (12, 3000) } else { (16, 4000) };
        let (name, cut) = match dice.random_range(0..kinds) {
            0..4 => ("reset", Cut::Reset),
            4..9 => ("early", Cut::Early(dice.random_range(1..bytes))),
            9..12 => ("stuck", Cut::Stuck(dice.random_range(0..40))),
            12..15 => ("closed", Cut::Closed),
            // A session takes its time to give up.
            _ => ("silence", Cut::Silence),
        };
        let begin = Instant::now();
        inflict(world, cut, dice.random_range(0..400)).context(name)?;
        let (times, took) = cuts.entry(name).or_default();
        (*times, *took) = (*times + 1, *took + begin.elapsed());
        pause(dice.random_range(0..700));
    }
    Ok(cuts)
}

fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// Cuts the line and waits for the next connection.
fn inflict(world: &World, cut: Cut, moment: u64) -> Result<()> {
    let (seen, logged) = (world.relay.connections(), world.edge.log_text().len());
    match cut {
        Cut::Reset | Cut::Stuck(_) => world.relay.reset(),
        Cut::Early(bytes) => {
            world.relay.set(|line| line.most = bytes);
            world.relay.reset();
        }
        Cut::Closed => {
            world.relay.close();
            pause(moment);
            world.relay.open();
        }
        Cut::Silence => {
            world.relay.cut();
            network::announce()?;
            // The kernel's news are told a second after those before, at the latest.
            pause(1100 + moment);
            world.relay.heal();
        }
    }
    // The network is back, so that the pauses between attempts stay short: at once, when the session has ended, and now and then.
    let (begin, mut told, mut is_over) = (Instant::now(), None::<Instant>, false);
    while world.relay.connections() == seen {
        let ended = !is_over && world.edge.log_text()[logged..].contains(LOST);
        if ended || told.is_none_or(|told| told.elapsed() > UNANSWERED) {
            if let (Cut::Silence, Some(_)) = (cut, told) {
                // Nobody asked, and nothing was lost.
                world.relay.reset();
            }
            network::announce()?;
            told = Some(Instant::now());
        }
        is_over |= ended;
        ensure!(begin.elapsed() < Duration::from_secs(60), "no new connection");
        pause(2);
    }
    if let Cut::Stuck(after) = cut {
        pause(after);
        world.relay.cut();
        pause(moment);
        world.relay.heal();
    }
    world.relay.set(|line| line.most = 0);
    Ok(())
}

/// One session stands, and carries.
fn rest(world: &World) -> Result<()> {
    until("exactly one session", 90, || {
        if !world.is_connected()? {
            // A session that is asked whether it lives is not asked again for 20 s: only who has none is told.
            network::announce()?;
            return Ok(false);
        }
        let carries = world.kubectl.pipe(&["exec", "one", "--", "true"], b"")?.code == Some(0);
        Ok(carries && world.is_connected()? && sessions(&world.cloud)? == 1.0)
    })
}

/// The most of each in three seconds: threads and tasks come and go.
fn usually_has(world: &World) -> Result<Had> {
    let mut most = has(world)?;
    for _ in 0..15 {
        pause(200);
        let now = has(world)?;
        most = Had {
            descriptors: most.descriptors.max(now.descriptors),
            threads: most.threads.max(now.threads),
            memory_kb: most.memory_kb.max(now.memory_kb),
            cloud_descriptors: most.cloud_descriptors.max(now.cloud_descriptors),
            cloud_tasks: most.cloud_tasks.max(now.cloud_tasks),
        };
    }
    Ok(most)
}

fn has(world: &World) -> Result<Had> {
    let edge = world.edge.pid().context("edgecore does not run")?;
    let cloud = world.cloud.pid().context("cloudcore does not run")?;
    Ok(Had {
        descriptors: procfs::descriptors(edge).context("no descriptors")?,
        threads: procfs::threads(edge).context("no threads")?,
        memory_kb: procfs::anonymous_kb(edge).context("no memory")?,
        cloud_descriptors: procfs::descriptors(cloud).context("no descriptors")?,
        cloud_tasks: world.cloud.metric("skerry_tasks")?,
    })
}
