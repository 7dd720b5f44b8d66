//! edgecore as programs on the box ask it: HTTP on its control socket.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::objects::PROPERTIES;

/// Sample count and value of each property of devices.
pub(super) type Samples = BTreeMap<String, Vec<(u64, u64)>>;

/// The control socket.
pub(super) struct Local(pub(super) PathBuf);

impl Local {
    fn get(&self, path: &str) -> Result<String> {
        let mut command = Command::new("curl");
        command.args(["-sf", "-m", "60", "--unix-socket"]).arg(&self.0).arg(format!("http://edgecore{path}"));
        let answer = command.output()?;
        ensure!(answer.status.success(), "{path}: {}", answer.status);
        Ok(String::from_utf8(answer.stdout)?)
    }

    /// Writes what a property should be.
    pub(super) fn write(&self, device: &str, property: &str, value: &str) -> Result<()> {
        let body = format!("{{\"value\":\"{value}\"}}");
        let mut stream = UnixStream::connect(&self.0)?;
        write!(
            stream,
            "PUT /devices/default/{device}/properties/{property} HTTP/1.1\r\nhost: edgecore\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 2"), "{device} was not written: {answer}");
        Ok(())
    }

    /// How many devices there are, how many values were taken, and how many devices whose names begin so can be reached.
    pub(super) fn figures(&self, prefix: &str) -> Result<(u64, u64, usize)> {
        let page = self.get("/metrics/devices")?;
        let number = |name: &str| -> Result<u64> {
            let found = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            Ok(found.with_context(|| format!("edgecore tells no {name}"))?.parse()?)
        };
        let up = format!("device_up{{namespace=\"default\",device=\"{prefix}");
        let reached = page.lines().filter(|line| line.starts_with(&up) && line.ends_with(" 1")).count();
        Ok((number("devices")?, number("device_values_total")?, reached))
    }

    /// Of devices named `PREFIX0` to the last of `count`.
    pub(super) fn samples(&self, prefix: &str, count: usize) -> Result<Samples> {
        let text = self.get(&format!("/devices/default/{prefix}[0-{}]", count - 1))?;
        let mut samples = Samples::new();
        for twin in serde_json::Deserializer::from_str(&text).into_iter::<Value>() {
            let twin = twin?;
            let of = |number: usize| {
                let reported = &twin["properties"][number]["reported"];
                let value = reported["value"].as_str().and_then(|value| value.parse().ok());
                (reported["version"].as_u64().unwrap_or_default(), value.unwrap_or_default())
            };
            let name = twin["name"].as_str().context("a twin without a name")?;
            samples.insert(name.to_owned(), (0..PROPERTIES).map(of).collect());
        }
        ensure!(samples.len() == count, "edgecore has {} twins, not {count}", samples.len());
        Ok(samples)
    }
}

/// Values that were read between the two, and how many of them edgecore did not take.
pub(super) fn between(before: &Samples, after: &Samples) -> (u64, u64) {
    let (mut read, mut taken) = (0, 0);
    for (name, after) in after {
        let Some(before) = before.get(name) else { continue };
        for (before, after) in before.iter().zip(after) {
            taken += after.0.saturating_sub(before.0);
            read += after.1.saturating_sub(before.1);
        }
    }
    (read, read.saturating_sub(taken))
}
