//! Who may say what to the broker that edgecore starts: mosquitto's access list, made from the devices.
//!
//! Whoever is on the box may use the broker as before, without a password, but for two things. The plain topics are edgecore's: others
//! read them. And a device whose annotation `skerry.dev/mqtt-writers` names users takes updates from these users only; they log in with
//! the passwords of the file `mqtt-passwd` in the data directory, made with `mosquitto_passwd`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The annotation of a Device: names of users, with commas between.
const WRITERS: &str = "skerry.dev/mqtt-writers";

/// Users that may write to a device, by key; devices that anybody may write to are not in it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Writers(BTreeMap<String, Vec<String>>);

impl Writers {
    /// Takes a Device as it is in the store, or that it is not there. Answers whether anything changed.
    pub(super) fn device(&mut self, key: &str, json: Option<&[u8]>) -> bool {
        match json.and_then(writers) {
            Some(writers) if self.0.get(key) == Some(&writers) => false,
            Some(writers) => {
                self.0.insert(key.to_owned(), writers);
                true
            }
            None => self.0.remove(key).is_some(),
        }
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The access list, for the users that there are.
    ///
    /// mosquitto looks at what is said of the user first, then at the patterns, and in each at what denies before what allows: so what a
    /// user may read of the plain topics is allowed before the pattern denies the rest.
    pub(super) fn list(&self, users: &[String]) -> String {
        let mut text = "# Made by edgecore; changes are lost.\n".to_owned();
        self.section(&mut text, None);
        for user in users {
            // Writing into a text does not fail.
            let _ = write!(text, "\nuser {user}\n");
            self.section(&mut text, Some(user));
        }
        text + "\npattern deny devices/#\npattern readwrite #\npattern readwrite $hw/#\npattern read $SYS/#\n"
    }

    fn section(&self, text: &mut String, user: Option<&String>) {
        text.push_str("topic read devices/#\n");
        let denied = self.0.iter().filter(|(_, writers)| !user.is_some_and(|user| writers.contains(user)));
        for (key, _) in denied {
            let name = key.split_once('/').map_or(key.as_str(), |(_, name)| name);
            for id in [key.as_str(), name] {
                for what in ["twin/update", "state/update"] {
                    let _ = writeln!(text, "topic deny {}", super::topic::device(id, what));
                }
            }
        }
    }
}

/// Of a Device in JSON.
fn writers(json: &[u8]) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Device {
        metadata: Metadata,
    }
    #[derive(serde::Deserialize)]
    struct Metadata {
        annotations: BTreeMap<String, String>,
    }
    // Few have it, and all are looked at.
    memchr::memmem::find(json, WRITERS.as_bytes())?;
    let device: Device = serde_json::from_slice(json).ok()?;
    let users = device.metadata.annotations.get(WRITERS)?.split(',').map(str::trim);
    Some(users.filter(|user| is_user(user)).map(str::to_owned).collect())
}

/// The users of mosquitto's password file.
pub(super) fn users(passwords: &str) -> Vec<String> {
    let mut users: Vec<String> = passwords
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0))
        .filter(|user| is_user(user))
        .map(str::to_owned)
        .collect();
    users.sort();
    users.dedup();
    users
}

/// Whether a name can stand in the list without being taken for something else.
fn is_user(name: &str) -> bool {
    !name.is_empty() && name.len() <= 256 && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn device(annotation: &str) -> Vec<u8> {
        serde_json::json!({ "kind": "Device", "metadata": { "annotations": { "x": "y", WRITERS: annotation } }, "spec": {} })
            .to_string()
            .into_bytes()
    }

    #[test]
    fn only_what_is_declared_is_denied() {
        let mut writers = Writers::default();
        assert!(!writers.device("default/open", Some(b"{\"metadata\":{\"name\":\"open\"}}")));
        assert!(writers.device("default/press", Some(&device("app1, app2,,bad user\n"))));
        assert!(!writers.device("default/press", Some(&device("app1,app2"))));
        let users = users("app1:$7$101$x==\napp3:y\n\nnot a user:z\napp1:again\n");
        assert_eq!(users, ["app1", "app3"]);
        let list = writers.list(&users);
        let of = |user: &str| list.split("\n\n").find(|part| part.contains(user)).unwrap().matches("deny").count();
        assert_eq!((of("Made by"), of("user app1"), of("user app3")), (4, 0, 4));
        assert!(list.contains("\ntopic deny $hw/events/device/default/press/twin/update\n"));
        assert!(list.contains("\ntopic deny $hw/events/device/press/state/update\n"));
        assert!(!list.contains("open") && list.ends_with("read $SYS/#\n"));
        // Of nobody: nobody may.
        assert!(writers.device("default/press", Some(&device(""))));
        assert!(writers.list(&users).matches("deny $hw").count() == 12);
        assert!(writers.device("default/press", None) && !writers.device("default/press", None));
        assert_eq!(writers, Writers::default());
    }

    proptest! {
        #[test]
        fn no_annotation_breaks_out_of_its_line(annotation in any::<String>(), passwords in any::<String>()) {
            let mut writers = Writers::default();
            writers.device("a/b", Some(&device(&annotation)));
            let of: Vec<String> = writers.0.values().flatten().cloned().collect();
            let known = ["#", "topic read ", "topic deny ", "user ", "pattern ", ""];
            for line in writers.list(&users(&passwords)).lines().chain(writers.list(&of).lines()) {
                prop_assert!(known.iter().any(|begin| line.starts_with(begin) && (line.is_empty() || !begin.is_empty())), "{line:?}");
                prop_assert!(line.split(' ').count() <= 3 || line.starts_with('#'));
            }
        }
    }
}
