//! A working pod network where the box has none: a bridge with host-local addresses, as a file that the runtime picks up.
//!
//! A configuration that is there already is never touched.

use std::path::{Path, PathBuf};

use crate::files;

/// The file edgecore writes, and by whose name `reset` knows it.
pub const FILE: &str = "10-skerry.conflist";
/// The bridge in it.
pub const BRIDGE: &str = "skerry0";
/// The plugins it needs.
const PLUGINS: [&str; 4] = ["bridge", "host-local", "portmap", "loopback"];

/// What there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// Somebody's configuration, this one.
    Present(PathBuf),
    /// None; plugins are there to make one work.
    Absent,
    /// None, and these plugins are missing.
    PluginsMissing(Vec<&'static str>),
}

/// Looks at what the runtime would find.
pub fn look(conf_dir: &Path, bin_dirs: &[PathBuf]) -> Network {
    let mut found: Vec<PathBuf> = std::fs::read_dir(conf_dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| ["conf", "conflist", "json"].iter().any(|known| extension == *known))
        })
        .collect();
    found.sort();
    if let Some(first) = found.into_iter().next() {
        return Network::Present(first);
    }
    let missing: Vec<&str> =
        PLUGINS.into_iter().filter(|plugin| !bin_dirs.iter().any(|dir| dir.join(plugin).is_file())).collect();
    if missing.is_empty() { Network::Absent } else { Network::PluginsMissing(missing) }
}

/// Writes the configuration if there is none. Answers what there was before.
pub fn ensure(conf_dir: &Path, bin_dirs: &[PathBuf], pod_cidr: &str) -> std::io::Result<Network> {
    let network = look(conf_dir, bin_dirs);
    if network == Network::Absent {
        std::fs::create_dir_all(conf_dir)?;
        files::write(&conf_dir.join(FILE), conflist(pod_cidr).as_bytes(), 0o644)?;
    }
    Ok(network)
}

fn conflist(pod_cidr: &str) -> String {
    let any = if pod_cidr.contains(':') { "::/0" } else { "0.0.0.0/0" };
    let list = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "skerry",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": pod_cidr }]],
                    "routes": [{ "dst": any }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
        ],
    });
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_only_where_there_is_none_and_the_plugins_are() {
        let dir = tempfile::tempdir().unwrap();
        let (conf, bin) = (dir.path().join("net.d"), dir.path().join("bin"));
        std::fs::create_dir(&bin).unwrap();
        let bins = [bin.clone()];
        assert_eq!(ensure(&conf, &bins, "10.88.0.0/16").unwrap(), Network::PluginsMissing(PLUGINS.to_vec()));
        for plugin in PLUGINS {
            std::fs::write(bin.join(plugin), "").unwrap();
        }
        assert_eq!(ensure(&conf, &bins, "10.88.0.0/16").unwrap(), Network::Absent);
        let written = std::fs::read_to_string(conf.join(FILE)).unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(&written).is_ok());
        assert_eq!(ensure(&conf, &bins, "10.99.0.0/16").unwrap(), Network::Present(conf.join(FILE)));
        assert_eq!(std::fs::read_to_string(conf.join(FILE)).unwrap(), written);
    }
}
