//! The pod network of one runtime: its bridge, its conflist, and what of both the machine still holds.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rand::RngExt as _;
use serde_json::{Value, json};

use crate::paths;
use crate::process::run;

/// What the bridges of tests are called.
pub const BRIDGE_PREFIX: &str = "sk-t";
/// What is written on the rules of [`Loss`].
const LOSS_MARK: &str = "skerry-test-loss";
/// A table of routes that no rule names.
const ANNOUNCED: &str = "7253";

/// Writes a bridge conflist with a name and a subnet that nobody here uses, host-local state in `ipam`.
pub fn write_conflist(conf_dir: &Path, ipam: &Path) -> Result<()> {
    let taken = addresses()?;
    let mut random = rand::rng();
    let subnet = loop {
        let prefix = format!("10.{}.{}.", random.random_range(130..250), random.random_range(0..250));
        if !taken.contains(&prefix) {
            break format!("{prefix}0/24");
        }
    };
    let name = format!("{BRIDGE_PREFIX}{:05x}", random.random_range(0..0x000f_ffff));
    let conflist = json!({
        "cniVersion": "0.4.0",
        "name": name,
        "plugins": [
            {
                "type": "bridge",
                "bridge": name,
                "isGateway": true,
                "ipMasq": false,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": ipam,
                    "ranges": [[{"subnet": subnet}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    fs::create_dir_all(conf_dir)?;
    fs::write(conf_dir.join("10-test.conflist"), serde_json::to_vec_pretty(&conflist)?)
        .with_context(|| format!("cannot write a conflist in {}", conf_dir.display()))
}

/// A network that a conflist describes.
#[derive(Clone, Debug)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its bridge, if it has one.
    pub bridge: Option<String>,
    /// Where host-local keeps its addresses.
    pub ipam: PathBuf,
}

/// The networks of a CNI configuration directory.
pub fn networks(conf_dir: &Path) -> Vec<Network> {
    let Ok(entries) = fs::read_dir(conf_dir) else { return Vec::new() };
    entries.filter_map(|entry| read(&entry.ok()?.path())).collect()
}

/// Takes the bridge and the port mappings off the machine, as a power cut does; addresses given out are on disk and stay.
pub fn unplug(network: &Network) {
    if let Some(bridge) = &network.bridge {
        run(Command::new("ip").args(["link", "del", bridge]), 10).ok();
    }
    remove_rules(&network.name);
}

/// [`unplug`], and forgets the addresses given out.
pub fn forget(network: &Network) {
    unplug(network);
    fs::remove_dir_all(network.ipam.join(&network.name)).ok();
    let Ok(results) = fs::read_dir("/var/lib/cni/results") else { return };
    for entry in results.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{}-", network.name)) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// Loses a part of the TCP segments to and from a port of this machine, as a bad line does, for as long as it lives.
#[derive(Debug)]
pub struct Loss(());

impl Loss {
    /// `rate` is from 0 to 1, in each direction.
    pub fn of(port: u16, rate: f64) -> Result<Self> {
        end_losses();
        let loss = Self(());
        for side in ["--dport", "--sport"] {
            let (port, rate) = (port.to_string(), rate.to_string());
            let rule =
                ["-w", "-I", "INPUT", "-i", "lo", "-p", "tcp", side, &port, "-m", "comment", "--comment", LOSS_MARK];
            let drop = ["-m", "statistic", "--mode", "random", "--probability", &rate, "-j", "DROP"];
            let output = run(Command::new(paths::tool("iptables", "iptables")?).args(rule).args(drop), 10)?;
            ensure!(output.success, "iptables cannot lose segments: {}", output.text());
        }
        Ok(loss)
    }
}

impl Drop for Loss {
    fn drop(&mut self) {
        end_losses();
    }
}

/// Ends what a [`Loss`] loses, also that of a run that was killed.
pub fn end_losses() {
    let Ok(iptables) = paths::tool("iptables", "iptables") else { return };
    let Ok(saved) = run(Command::new(&iptables).args(["-w", "-S", "INPUT"]), 10) else { return };
    for rule in saved.stdout.lines().filter(|rule| rule.contains(LOSS_MARK)) {
        let rest = rule.split_whitespace().skip(1);
        run(Command::new(&iptables).args(["-w", "-D"]).args(rest), 10).ok();
    }
}

/// Has everyone who listens hear of a default route, as when a network comes back. It is in a table of its own, by which nothing is sent.
pub fn announce() -> Result<()> {
    for verb in ["replace", "delete"] {
        let route = ["route", verb, "unicast", "default", "dev", "lo", "table", ANNOUNCED];
        let output = run(Command::new("ip").args(route), 10)?;
        ensure!(output.success, "no route can be announced: {}", output.text());
    }
    Ok(())
}

fn read(path: &Path) -> Option<Network> {
    let config: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let name = config["name"].as_str()?.to_owned();
    let first = &config["plugins"][0];
    let bridge = (first["type"] == "bridge").then(|| first["bridge"].as_str().unwrap_or("cni0").to_owned());
    let ipam = first["ipam"]["dataDir"].as_str().unwrap_or("/var/lib/cni/networks").into();
    Some(Network { name, bridge, ipam })
}

/// Removes the nat rules that name this network in their comment, and the chains only they led to.
fn remove_rules(network: &str) {
    let Ok(iptables) = paths::tool("iptables", "iptables") else { return };
    let Ok(saved) = run(Command::new(&iptables).args(["-t", "nat", "-S"]), 10) else { return };
    let mark = format!("name: \\\"{network}\\\"");
    let mut chains = BTreeSet::new();
    for rule in saved.stdout.lines().filter(|rule| rule.starts_with("-A ") && rule.contains(&mark)) {
        let mut words = split_rule(rule);
        if let Some(target) = words.iter().position(|word| word == "-j").and_then(|at| words.get(at + 1))
            && target.starts_with("CNI-")
        {
            chains.insert(target.clone());
        }
        "-D".clone_into(&mut words[0]);
        run(Command::new(&iptables).args(["-w", "-t", "nat"]).args(&words), 10).ok();
    }
    for chain in chains.iter().filter(|chain| !chain.starts_with("CNI-HOSTPORT")) {
        run(Command::new(&iptables).args(["-w", "-t", "nat", "-F", chain]), 10).ok();
        run(Command::new(&iptables).args(["-w", "-t", "nat", "-X", chain]), 10).ok();
    }
}

/// Splits a line of `iptables -S`, whose only quoting is double quotes with backslashes.
fn split_rule(rule: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let (mut quoted, mut escaped) = (false, false);
    for letter in rule.chars() {
        let at = words.len() - 1;
        match letter {
            _ if escaped => {
                words[at].push(letter);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words[at].push(letter),
        }
    }
    words
}

/// The first three numbers, with a dot behind them, of every address of this machine.
fn addresses() -> Result<BTreeSet<String>> {
    let list = run(Command::new("ip").args(["-o", "-4", "address"]), 10)
        .context("the ip command is missing: apt-get install iproute2")?;
    let addresses = list.stdout.lines().filter_map(|line| line.split_whitespace().nth(3));
    Ok(addresses.filter_map(|address| address.rsplit_once('.')).map(|(prefix, _)| format!("{prefix}.")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_split_as_a_shell_would() {
        let rule = r#"-A POSTROUTING -m comment --comment "name: \"net\" id: \"c1\"" -j CNI-1"#;
        let words = split_rule(rule);
        assert_eq!(words[5], r#"name: "net" id: "c1""#);
        assert_eq!(words.last().unwrap(), "CNI-1");
    }
}
