//! `$(NAME)` references in commands, arguments and values.
//!
//! `$$` is a `$`; a reference that cannot be resolved, one that is not closed, and a lone `$` stay as written.

/// Replaces the references in `input`; `lookup` knows the values.
pub fn expand<'v>(input: &str, lookup: impl Fn(&str) -> Option<&'v str>) -> String {
    walk(input, |name, output| match lookup(name) {
        Some(value) => output.push_str(value),
        None => {
            output.push_str("$(");
            output.push_str(name);
            output.push(')');
        }
    })
}

/// Replaces the references in a path that must be complete: answers with the sorted names that are unset or empty, if there are any.
pub fn expand_strict<'v>(input: &str, lookup: impl Fn(&str) -> Option<&'v str>) -> Result<String, MissingValues> {
    let mut missing = std::collections::BTreeSet::new();
    let expanded = walk(input, |name, output| match lookup(name) {
        Some(value) if !value.is_empty() => output.push_str(value),
        _ => {
            missing.insert(name.to_owned());
        }
    });
    if missing.is_empty() {
        Ok(expanded)
    } else {
        Err(MissingValues(missing.into_iter().collect::<Vec<_>>().join(", ")))
    }
}

/// References without a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("missing value for {0}")]
pub struct MissingValues(String);

/// The value of `name` in an environment; the last one counts.
pub fn value_in<'v>(environment: &'v [(String, String)], name: &str) -> Option<&'v str> {
    environment.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

fn walk(input: &str, mut reference: impl FnMut(&str, &mut String)) -> String {
    let mut output = String::with_capacity(input.len());
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        output.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            output.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            reference(name, &mut output);
            rest = after;
        } else {
            output.push('$');
        }
    }
    output.push_str(rest);
    output
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn known(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("a"),
            "B" => Some("$(A)"),
            "E" => Some(""),
            _ => None,
        }
    }

    #[test]
    fn references() {
        for (input, expected) in [
            ("", ""),
            ("$(A)", "a"),
            ("x$(A)y$(A)z", "xayaz"),
            ("$(B)", "$(A)"),
            ("$(E)", ""),
            ("$(MISSING)", "$(MISSING)"),
            ("$$", "$"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$a"),
            ("$$$$(A)", "$$(A)"),
            ("$", "$"),
            ("a$", "a$"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$($(A)", "$($(A)"),
            ("$()", "$()"),
            ("${A}", "${A}"),
            ("é$(A)é$é", "éaé$é"),
        ] {
            assert_eq!(expand(input, known), expected, "{input}");
        }
    }

    #[test]
    fn strict_names_all_that_is_missing() {
        let environment = [("A", "1"), ("E", ""), ("A", "2")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let strict =
            |input| expand_strict(input, |name| value_in(&environment, name)).map_err(|error| error.to_string());
        assert_eq!(strict("x/$(A)/y").as_deref(), Ok("x/2/y"));
        assert_eq!(strict("$$(A)$").as_deref(), Ok("$(A)$"));
        assert_eq!(strict("$(A").as_deref(), Ok("$(A"));
        assert_eq!(expand_strict("$(A)/$$x", known), Ok("a/$x".to_owned()));
        let error = expand_strict("$(Z)$(E)$(A)$(Z)", known).unwrap_err();
        assert_eq!(error.to_string(), "missing value for E, Z");
    }

    proptest! {
        #[test]
        fn doubled_dollars_come_back_as_written(text in any::<String>()) {
            prop_assert_eq!(expand(&text.replace('$', "$$"), |_| Some("never")), text);
        }

        #[test]
        fn a_known_value_is_put_in_as_it_is(before in "[^$]*", value in any::<String>(), after in any::<String>()) {
            let whole = expand(&format!("{before}$(NAME){after}"), |name| (name == "NAME").then_some(value.as_str()));
            let rest = expand(&after, |name| (name == "NAME").then_some(value.as_str()));
            prop_assert_eq!(whole, format!("{before}{value}{rest}"));
        }

        #[test]
        fn without_dollar_pairs_and_values_nothing_changes(text in "[$()A-Z ]*") {
            prop_assume!(!text.contains("$$"));
            prop_assert_eq!(expand(&text, |_| None), text);
        }
    }
}
