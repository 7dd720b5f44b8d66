//! The topics: KubeEdge's, `$hw/events/…`, and the plain ones, `devices/<namespace>/<name>/<property>`.

/// Under which KubeEdge's device topics are.
pub(super) const DEVICE: &str = "$hw/events/device/";
/// Under which its membership topics are.
const NODE: &str = "$hw/events/node/";
/// Under which the plain topics are.
pub(super) const PLAIN: &str = "devices/";
/// The last level of the plain topic of a device's state. No property can have it: see [`level`].
const STATE: &str = "$state";

/// What a device may be called in a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Id<'a> {
    /// `<namespace>/<name>`, two levels.
    Full(&'a str),
    /// One level, of KubeEdge before 1.13: whichever device has this name.
    Name(&'a str),
}

impl<'a> Id<'a> {
    /// As it stands in the topic; answers go to the topics of the same.
    pub(super) fn text(self) -> &'a str {
        match self {
            Self::Full(text) | Self::Name(text) => text,
        }
    }
}

/// What is asked by a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked<'a> {
    /// `twin/update`.
    TwinUpdate(Id<'a>),
    /// `twin/get`.
    TwinGet(Id<'a>),
    /// `state/update`.
    StateUpdate(Id<'a>),
    /// `membership/get`.
    MembershipGet,
}

/// What edgecore subscribes to.
pub(super) fn filters(node: &str) -> Vec<String> {
    let mut filters = Vec::new();
    for what in ["twin/update", "twin/get", "state/update"] {
        filters.push(format!("{DEVICE}+/{what}"));
        filters.push(format!("{DEVICE}+/+/{what}"));
    }
    filters.push(format!("{NODE}{node}/membership/get"));
    filters
}

/// Reads a topic; `None` if nothing is asked by it.
pub(super) fn parse<'a>(topic: &'a str, node: &str) -> Option<Asked<'a>> {
    if let Some(rest) = topic.strip_prefix(NODE) {
        return (rest.strip_prefix(node)? == "/membership/get").then_some(Asked::MembershipGet);
    }
    let rest = topic.strip_prefix(DEVICE)?;
    let (id, asked): (_, fn(Id<'a>) -> Asked<'a>) = if let Some(id) = rest.strip_suffix("/twin/update") {
        (id, Asked::TwinUpdate)
    } else if let Some(id) = rest.strip_suffix("/twin/get") {
        (id, Asked::TwinGet)
    } else {
        (rest.strip_suffix("/state/update")?, Asked::StateUpdate)
    };
    match id.split_once('/') {
        None if !id.is_empty() => Some(asked(Id::Name(id))),
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Some(asked(Id::Full(id)))
        }
        _ => None,
    }
}

/// A topic of a device: `what` is `twin/update/result` and the like.
pub(super) fn device(id: &str, what: &str) -> String {
    format!("{DEVICE}{id}/{what}")
}

/// A topic of the node.
pub(super) fn membership(node: &str, what: &str) -> String {
    format!("{NODE}{node}/membership/{what}")
}

/// The plain topic of a property of the device `<namespace>/<name>`.
pub(super) fn value(device: &str, property: &str) -> String {
    format!("{PLAIN}{device}/{}", level(property))
}

/// The plain topic of a device's state.
pub(super) fn state(device: &str) -> String {
    format!("{PLAIN}{device}/{STATE}")
}

/// A text as one level of a topic: what has a meaning in topics, or would begin a name of ours, is written as in URLs.
fn level(text: &str) -> String {
    let mut level = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        if matches!(c, '+' | '#' | '/' | '%') || c.is_ascii_control() || (at == 0 && c == '$') {
            level.push_str(&format!("%{:02X}", u32::from(c)));
        } else {
            level.push(c);
        }
    }
    level
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn topics_are_read_as_they_are_written() {
        for (topic, asked) in [
            ("$hw/events/device/default/lamp/twin/update", Some(Asked::TwinUpdate(Id::Full("default/lamp")))),
            ("$hw/events/device/lamp/twin/update", Some(Asked::TwinUpdate(Id::Name("lamp")))),
            ("$hw/events/device/default/lamp/twin/get", Some(Asked::TwinGet(Id::Full("default/lamp")))),
            ("$hw/events/device/lamp/state/update", Some(Asked::StateUpdate(Id::Name("lamp")))),
            // A device may be called as a part of a topic is.
            ("$hw/events/device/twin/twin/twin/get", Some(Asked::TwinGet(Id::Full("twin/twin")))),
            ("$hw/events/node/box-1/membership/get", Some(Asked::MembershipGet)),
            ("$hw/events/node/box-2/membership/get", None),
            ("$hw/events/device/default/lamp/twin/update/result", None),
            ("$hw/events/device/default/lamp/twin/cloud_updated", None),
            ("$hw/events/device/a/b/c/twin/update", None),
            ("$hw/events/device//lamp/twin/update", None),
            ("$hw/events/device//twin/update", None),
            ("$hw/events/device/twin/update", None),
            ("devices/default/lamp/x", None),
            ("", None),
        ] {
            assert_eq!(parse(topic, "box-1"), asked, "{topic}");
        }
        assert_eq!(filters("box-1").len(), 7);
        assert_eq!(device("default/lamp", "twin/get/result"), "$hw/events/device/default/lamp/twin/get/result");
        assert_eq!(membership("box-1", "updated"), "$hw/events/node/box-1/membership/updated");
        assert_eq!(value("default/lamp", "power"), "devices/default/lamp/power");
        assert_eq!(value("default/lamp", "$state"), "devices/default/lamp/%24state");
        assert_eq!(value("default/lamp", "a/b+c#d%e\n$"), "devices/default/lamp/a%2Fb%2Bc%23d%25e%0A$");
        assert_eq!(state("default/lamp"), "devices/default/lamp/$state");
    }

    proptest! {
        #[test]
        fn any_topic_is_answered(topic in "(\\$hw/events/(device|node)/)?[a-z+#/$]{0,30}(/twin/update|/twin/get)?") {
            let _ = parse(&topic, "n");
        }

        #[test]
        fn a_property_is_one_level_that_nothing_else_has(a in any::<String>(), b in any::<String>()) {
            let (level_a, level_b) = (level(&a), level(&b));
            prop_assert!(!level_a.contains(['+', '#', '/', '\0']) && level_a != STATE);
            prop_assert_eq!(level_a == level_b, a == b);
        }
    }
}
