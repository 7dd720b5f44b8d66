//! What edgecore has systemd do, written down by a stand-in: no test machine has units of ours, and most have no systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::process::{self, Output};

/// A mount namespace in which systemd seems to run, and the units are those in a directory.
const SCRIPT: &str = r#"mount -t tmpfs none /run
mkdir -p /run/systemd/system /etc/systemd/system
mount --bind "$0" /etc/systemd/system
exec "$@""#;

/// The stand-in.
#[derive(Debug)]
pub struct Systemd {
    dir: PathBuf,
}

impl Systemd {
    /// One that has no units, with its files in `dir`.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("units"))?;
        fs::create_dir_all(dir.join("bin"))?;
        let program = dir.join("bin/systemctl");
        fs::write(&program, format!("#!/bin/sh\necho \"$@\" >> {}\n", dir.join("calls").display()))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Runs a command where it seems to run; how that ended, and what `systemctl` was called with meanwhile.
    pub fn run(&self, command: &mut Command) -> Result<(Output, Vec<String>)> {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.dir.join("bin").display()));
        let units = self.dir.join("units").display().to_string();
        let output =
            process::run(&mut process::under(&["unshare", "--mount", "sh", "-ec", SCRIPT, &units], command), 60)?;
        let calls = self.dir.join("calls");
        let said = fs::read_to_string(&calls).unwrap_or_default();
        fs::write(&calls, "")?;
        Ok((output, said.lines().map(str::to_owned).collect()))
    }

    /// A unit's file, if it is there.
    pub fn unit(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.dir.join("units").join(name)).ok()
    }
}
