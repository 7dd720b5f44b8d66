//! The service that the agent is under systemd: the text of its unit, which `join` installs and `reset` removes. A box has one, and it
//! belongs to the data directory that it names.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use tokio::process::Command;

use crate::config::{self, DATA_DIR};

const TEMPLATE: &str = include_str!("../../../deploy/systemd/edgecore.service");
/// Where the unit is.
pub(super) const PATH: &str = "/etc/systemd/system/edgecore.service";
const START: &str = "ExecStart=";
const OPTION: &str = "--data-dir";
/// What systemd allows in no program's path, however it is quoted.
const NOT_IN_PROGRAMS: &[char] = &['"', '\'', '\\'];

/// Whether systemd runs the services here.
pub(super) fn is_systemd() -> bool {
    Path::new("/run/systemd/system").exists()
}

/// The unit that is there, if one is.
pub(super) fn installed() -> Option<String> {
    std::fs::read_to_string(PATH).ok()
}

/// The unit for a data directory, to take the place of what is `installed`. That of another data directory is not taken over, unless
/// nothing has joined from there (any more).
pub(super) fn text(installed: Option<&str>, program: &Path, data_dir: &Path) -> anyhow::Result<String> {
    if let Some(unit) = installed.filter(|unit| !is_of(unit, data_dir)) {
        let other = data_dir_of(unit);
        if other.join(config::FILE).exists() {
            let other = for_shell(&other);
            bail!(
                "edgecore.service is the agent of {other} already; join with --no-start and start this one by other means, or run `edgecore reset --data-dir {other}` first"
            );
        }
    }
    // systemd.service(5): variables are not looked for in the program's path, so that a `$` is one there.
    let program = word(checked(program, NOT_IN_PROGRAMS)?).replace("$$", "$");
    let start = format!("{START}{program} run {OPTION} {}", word(checked(data_dir, &[])?));
    let mut unit = String::new();
    for line in TEMPLATE.lines() {
        unit.push_str(if line.starts_with(START) { start.as_str() } else { line });
        unit.push('\n');
    }
    Ok(unit)
}

/// Whether that is the unit of this data directory's agent.
pub(super) fn is_of(unit: &str, data_dir: &Path) -> bool {
    let real = |dir: &Path| dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    real(&data_dir_of(unit)) == real(data_dir)
        // Earlier versions quoted nothing.
        || start(unit).ends_with(&format!(" run {OPTION} {}", data_dir.display()))
}

/// What starts the agent, for a shell.
pub(super) fn command(program: &Path, data_dir: &Path) -> String {
    format!("{} run {OPTION} {}", for_shell(program), for_shell(data_dir))
}

/// Has systemd do something.
pub(super) async fn systemctl(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("systemctl").args(arguments).output().await.context("cannot run systemctl")?;
    if !output.status.success() {
        bail!(
            "`systemctl {}` failed: {}; see `journalctl -u edgecore`",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The command line of a unit.
fn start(unit: &str) -> &str {
    unit.lines().find_map(|line| line.strip_prefix(START)).unwrap_or_default().trim()
}

/// The data directory of the agent that a unit starts.
fn data_dir_of(unit: &str) -> PathBuf {
    let mut words = words(start(unit)).into_iter();
    while let Some(word) = words.next() {
        let given = match word.strip_prefix(OPTION) {
            Some("") => words.next(),
            Some(rest) => rest.strip_prefix('=').map(str::to_owned),
            None => None,
        };
        if let Some(dir) = given {
            return dir.into();
        }
    }
    DATA_DIR.into()
}

/// A path as text that can stand in a unit.
fn checked<'a>(path: &'a Path, forbidden: &[char]) -> anyhow::Result<&'a str> {
    let is_forbidden = |c: char| c.is_control() || forbidden.contains(&c);
    path.to_str().filter(|text| !text.contains(is_forbidden)).with_context(|| {
        format!("systemd does not take the path {path:?}, for the characters in it; rename it, or join with --no-start")
    })
}

/// One word of a command line of systemd, in quotes if it needs them (systemd.syntax(7), systemd.service(5)).
fn word(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let mut word = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => word.push('\\'),
            '%' | '$' => word.push(c),
            _ => {}
        }
        word.push(c);
    }
    word.push('"');
    word
}

/// The words of a command line of systemd. Of the escapes only those are known that [`word`] makes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' if quote.is_none() => words.extend(word.take()),
            '"' | '\'' if quote.is_none() => quote = Some(c),
            _ if quote == Some(c) => quote = None,
            '\\' => word.get_or_insert_default().extend(chars.next()),
            _ => {
                if c == '%' || c == '$' {
                    let _ = chars.next_if_eq(&c);
                }
                word.get_or_insert_default().push(c);
            }
        }
    }
    words.extend(word);
    words
}

/// A path as a shell takes it, in quotes if it needs them.
fn for_shell(path: &Path) -> String {
    let text = path.to_string_lossy();
    if is_plain(&text) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Whether a text means itself to systemd and to a shell.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+,:@=".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "/usr/local/bin/edgecore";
    const ODD: [&str; 8] =
        ["/a b", "/a\"b\" c", "/it's", "/a\\b", "/100%/%h", "/$HOME/${X}$", "/a ; b\\", "/a --data-dir /b ü"];

    fn unit(arguments: &str) -> String {
        format!("[Service]\nType=notify\nExecStart=/usr/bin/edgecore run{arguments}\n")
    }

    #[test]
    fn a_unit_is_the_data_directorys_that_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let given = |option: &str| unit(&format!(" {option}{}", dir.path().display()));
        assert!(is_of(&given("--data-dir "), dir.path()) && is_of(&given("--data-dir="), &link));
        assert!(is_of(&unit(&format!(" --data-dir=\"{}\" -v", dir.path().display())), dir.path()));
        assert!(!is_of(&given("--data-dir "), Path::new(DATA_DIR)));
        assert!(is_of(&unit(""), Path::new(DATA_DIR)) && !is_of(&unit(""), dir.path()));
        assert!(is_of(TEMPLATE, Path::new(DATA_DIR)));
    }

    #[test]
    fn whatever_a_path_holds_is_read_back() {
        for odd in ODD {
            let unit = text(None, Path::new(PROGRAM), Path::new(odd)).unwrap();
            assert_eq!(words(start(&unit)), [PROGRAM, "run", OPTION, odd]);
            assert!(is_of(&unit, Path::new(odd)) && !is_of(&unit, Path::new("/a")) && !is_of(&unit, Path::new("/b")));
            // As earlier versions wrote it.
            let bare = format!("[Service]\nExecStart={PROGRAM} run --data-dir {odd}\n");
            assert!(is_of(&bare, Path::new(odd)), "{bare}");
        }
    }

    #[test]
    fn paths_are_quoted_for_systemd_and_for_a_shell() {
        let unit = text(None, Path::new("/opt/my $x 5%/edgecore"), Path::new("/d \"q\" \\ %h $X")).unwrap();
        let line = r#"ExecStart="/opt/my $x 5%%/edgecore" run --data-dir "/d \"q\" \\ %%h $$X""#;
        assert!(unit.lines().any(|found| found == line), "{unit}");
        let plain = text(None, Path::new(PROGRAM), Path::new(DATA_DIR)).unwrap();
        assert_eq!(plain, TEMPLATE);
        assert_eq!(command(Path::new(PROGRAM), Path::new("/a")), format!("{PROGRAM} run --data-dir /a"));
        assert_eq!(command(Path::new("/a b"), Path::new("/it's")), r"'/a b' run --data-dir '/it'\''s'");
    }

    #[test]
    fn what_systemd_cannot_start_is_refused() {
        for program in ["/it's/edgecore", "/a\\b", "/a\"b"] {
            let error = text(None, Path::new(program), Path::new("/a")).unwrap_err().to_string();
            assert!(error.contains("rename it, or join with --no-start"), "{error}");
        }
        let error = text(None, Path::new(PROGRAM), Path::new("/a\nExecStart=/b")).unwrap_err().to_string();
        assert!(error.contains("/a\\nExecStart=/b"), "{error}");
    }

    #[test]
    fn the_service_of_another_data_directory_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("the first"), dir.path().join("second"));
        std::fs::create_dir(&first).unwrap();
        let program = Path::new(PROGRAM);
        let installed = text(None, program, &first).unwrap();
        // Nothing has joined from there: the unit is what is left of it.
        text(Some(&installed), program, &second).unwrap();
        std::fs::write(first.join(config::FILE), "").unwrap();
        assert_eq!(text(Some(&installed), program, &first).unwrap(), installed);
        let error = text(Some(&installed), program, &second).unwrap_err().to_string();
        let remedy = format!(
            "join with --no-start and start this one by other means, or run `edgecore reset --data-dir '{}'`",
            first.display()
        );
        assert!(error.contains(&remedy), "{error}");
    }
}
