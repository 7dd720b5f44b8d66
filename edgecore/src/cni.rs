//! A working pod network where the box has none: a bridge with host-local addresses, as a file that the runtime picks up. It is looked
//! for, and written, where the runtime looks for it.
//!
//! A configuration that is there already is never touched.

use std::path::PathBuf;

use crate::config::Config;
use crate::files;
use crate::runtime::cri::Setup;

/// The file edgecore writes, and by whose name `reset` knows it.
pub const FILE: &str = "10-skerry.conflist";
/// The bridge in it.
pub const BRIDGE: &str = "skerry0";
/// The plugins it needs.
const PLUGINS: [&str; 4] = ["bridge", "host-local", "portmap", "loopback"];

/// Where a runtime looks that does not say where.
const CONF_DIR: &str = "/etc/cni/net.d";
const BIN_DIRS: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];

/// Where configurations and plugins are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Configurations.
    pub conf_dir: PathBuf,
    /// Plugins.
    pub bin_dirs: Vec<PathBuf>,
}

impl Places {
    /// As the configuration says, else as the runtime does, else where they usually are.
    pub fn of(config: &Config, setup: &Setup) -> Self {
        let conf_dir = config.cni_conf_dir.clone().or_else(|| setup.cni_conf_dir.as_ref().map(PathBuf::from));
        let told = || setup.cni_bin_dirs.iter().map(PathBuf::from).collect::<Vec<_>>();
        let bin_dirs = config.cni_bin_dirs.clone().unwrap_or_else(told);
        Self {
            conf_dir: conf_dir.unwrap_or_else(|| CONF_DIR.into()),
            bin_dirs: if bin_dirs.is_empty() { BIN_DIRS.iter().map(PathBuf::from).collect() } else { bin_dirs },
        }
    }
}

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
pub fn look(Places { conf_dir, bin_dirs }: &Places) -> Network {
    let first = std::fs::read_dir(conf_dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| ["conf", "conflist", "json"].iter().any(|known| extension == *known))
        })
        .min();
    if let Some(first) = first {
        return Network::Present(first);
    }
    let missing: Vec<&str> =
        PLUGINS.into_iter().filter(|plugin| !bin_dirs.iter().any(|dir| dir.join(plugin).is_file())).collect();
    if missing.is_empty() { Network::Absent } else { Network::PluginsMissing(missing) }
}

/// Writes the configuration if there is none. Answers what there was before.
pub fn ensure(places: &Places, pod_cidr: &str) -> std::io::Result<Network> {
    let network = look(places);
    if network == Network::Absent {
        std::fs::create_dir_all(&places.conf_dir)?;
        files::write(&places.conf_dir.join(FILE), conflist(pod_cidr).as_bytes(), 0o644)?;
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
    use std::path::Path;

    use super::*;

    #[test]
    fn it_is_written_only_where_there_is_none_and_the_plugins_are() {
        let dir = tempfile::tempdir().unwrap();
        let (conf, bin) = (dir.path().join("net.d"), dir.path().join("bin"));
        std::fs::create_dir(&bin).unwrap();
        let places = Places { conf_dir: conf.clone(), bin_dirs: vec![bin.clone()] };
        assert_eq!(ensure(&places, "10.88.0.0/16").unwrap(), Network::PluginsMissing(PLUGINS.to_vec()));
        for plugin in PLUGINS {
            std::fs::write(bin.join(plugin), "").unwrap();
        }
        assert_eq!(ensure(&places, "10.88.0.0/16").unwrap(), Network::Absent);
        let written = std::fs::read_to_string(conf.join(FILE)).unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(&written).is_ok());
        assert_eq!(ensure(&places, "10.99.0.0/16").unwrap(), Network::Present(conf.join(FILE)));
        assert_eq!(std::fs::read_to_string(conf.join(FILE)).unwrap(), written);
    }

    #[test]
    fn the_configuration_goes_before_the_runtime_and_that_before_habit() {
        let mut config = Config::new(&"h:1".parse().unwrap(), "box");
        let usual = Places::of(&config, &Setup::default());
        assert_eq!(usual.conf_dir, Path::new("/etc/cni/net.d"));
        assert_eq!(usual.bin_dirs.len(), 3);
        let setup = Setup {
            cni_conf_dir: Some("/run/net.d".to_owned()),
            cni_bin_dirs: vec!["/usr/lib/cni".to_owned()],
            ..Setup::default()
        };
        let told = Places::of(&config, &setup);
        assert_eq!((told.conf_dir, told.bin_dirs), ("/run/net.d".into(), vec!["/usr/lib/cni".into()]));
        config.cni_conf_dir = Some("/srv/net.d".into());
        config.cni_bin_dirs = Some(vec!["/srv/bin".into()]);
        let chosen = Places::of(&config, &setup);
        assert_eq!((chosen.conf_dir, chosen.bin_dirs), ("/srv/net.d".into(), vec!["/srv/bin".into()]));
    }
}
