//! Answers that are good for some time, by the hash of what was asked; the oldest go when there are too many.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// A hash of a question.
pub(crate) type Key = [u8; 32];

/// A bounded number of answers.
#[derive(Debug)]
pub(crate) struct Cache<V> {
    most: usize,
    next: u64,
    answers: HashMap<Key, Answer<V>>,
    /// In the order in which they came.
    by_age: BTreeMap<u64, Key>,
}

#[derive(Debug)]
struct Answer<V> {
    value: V,
    until: Duration,
    number: u64,
}

impl<V> Cache<V> {
    /// At most so many.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, next: 0, answers: HashMap::new(), by_age: BTreeMap::new() }
    }

    /// What is known at this time.
    pub(crate) fn look(&self, key: &Key, now: Duration) -> Option<&V> {
        self.answers.get(key).filter(|answer| now < answer.until).map(|answer| &answer.value)
    }

    /// Keeps an answer until then.
    pub(crate) fn keep(&mut self, key: Key, value: V, until: Duration) {
        let number = self.next;
        self.next += 1;
        if let Some(before) = self.answers.insert(key, Answer { value, until, number }) {
            self.by_age.remove(&before.number);
        }
        self.by_age.insert(number, key);
        while self.answers.len() > self.most {
            let Some((_, oldest)) = self.by_age.pop_first() else { break };
            self.answers.remove(&oldest);
        }
    }
}

/// The SHA-256 of a question, so that what is asked with (a token, say) is not kept.
pub(crate) fn key(question: &[u8]) -> Key {
    let mut key = Key::default();
    key.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, question).as_ref());
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn an_answer_is_good_until_its_time() {
        let mut cache = Cache::new(8);
        let asked = key(b"may she?");
        assert_eq!(cache.look(&asked, seconds(0)), None);
        cache.keep(asked, true, seconds(120));
        assert_eq!(cache.look(&asked, seconds(119)), Some(&true));
        assert_eq!(cache.look(&asked, seconds(120)), None);
        cache.keep(asked, false, seconds(300));
        assert_eq!(cache.look(&asked, seconds(200)), Some(&false));
        assert_eq!(cache.look(&key(b"may he?"), seconds(200)), None);
    }

    #[test]
    fn the_oldest_of_too_many_go() {
        let mut cache = Cache::new(2);
        for (number, question) in ["a", "b", "a", "c"].into_iter().enumerate() {
            cache.keep(key(question.as_bytes()), number, seconds(100));
        }
        let known = |question: &str| cache.look(&key(question.as_bytes()), seconds(1)).copied();
        assert_eq!((known("a"), known("b"), known("c")), (Some(2), None, Some(3)));
        assert_eq!((cache.answers.len(), cache.by_age.len()), (2, 2));
    }
}
