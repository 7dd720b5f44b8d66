//! Answers that are good for some time, by the hash of what was asked. When there are too many, those go that are good for the shortest time
//! yet: what is nobody's is so for seconds, and a flood of that drives out no more than itself.

use std::collections::{BTreeMap, HashMap};
use std::sync::{self, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;

use crate::clock;

/// How long an answer of the apiserver's is waited for.
const PATIENCE: Duration = Duration::from_secs(8);

/// A hash of a question.
pub(crate) type Key = [u8; 32];

/// A bounded number of answers.
#[derive(Debug)]
pub(crate) struct Cache<V> {
    most: usize,
    next: u64,
    answers: HashMap<Key, Answer<V>>,
    /// Until when they are good, and their numbers.
    by_end: BTreeMap<(Duration, u64), Key>,
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
        Self { most, next: 0, answers: HashMap::new(), by_end: BTreeMap::new() }
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
            self.by_end.remove(&(before.until, before.number));
        }
        self.by_end.insert((until, number), key);
        while self.answers.len() > self.most {
            let Some((_, first)) = self.by_end.pop_first() else { break };
            self.answers.remove(&first);
        }
    }
}

/// What the apiserver is asked once for as long as its answer is good.
#[derive(Debug)]
pub(crate) struct Asked<V> {
    answers: sync::Mutex<Cache<V>>,
    /// A question waits for those that have the same turn; what is asked twice has the same one.
    turns: Vec<Mutex<()>>,
}

/// It does not answer in time.
#[derive(Debug)]
pub(crate) struct Silence;

impl<V: Clone> Asked<V> {
    /// At most so many answers are kept, and so many questions under way.
    pub(crate) fn new(most: usize, at_once: usize) -> Self {
        let turns = std::iter::repeat_with(Mutex::default).take(at_once).collect();
        Self { answers: sync::Mutex::new(Cache::new(most)), turns }
    }

    /// What is known, or else what `ask` answers, which is then good for so long.
    pub(crate) async fn get<E: From<Silence>>(
        &self,
        question: &[u8],
        ask: impl Future<Output = Result<V, E>>,
        good_for: impl FnOnce(&V) -> Duration,
    ) -> Result<V, E> {
        let key = key(question);
        let answers = || self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let known = || answers().look(&key, clock::monotonic()).cloned();
        if let Some(answer) = known() {
            return Ok(answer);
        }
        let review = async {
            let turn = usize::from(key[0]) % self.turns.len().max(1);
            let _turn = match self.turns.get(turn) {
                Some(turn) => Some(turn.lock().await),
                None => None,
            };
            // Somebody may have asked meanwhile.
            if let Some(answer) = known() {
                return Ok(answer);
            }
            let answer = ask.await?;
            answers().keep(key, answer.clone(), clock::monotonic() + good_for(&answer));
            Ok(answer)
        };
        tokio::time::timeout(PATIENCE, review).await.unwrap_or_else(|_| Err(Silence.into()))
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
    fn of_too_many_those_go_that_end_first() {
        let mut cache = Cache::new(2);
        for (number, question) in ["a", "b", "a", "c"].into_iter().enumerate() {
            cache.keep(key(question.as_bytes()), number, seconds(100));
        }
        let known = |cache: &Cache<usize>, question: &str| cache.look(&key(question.as_bytes()), seconds(1)).copied();
        assert_eq!((known(&cache, "a"), known(&cache, "b"), known(&cache, "c")), (Some(2), None, Some(3)));
        assert_eq!((cache.answers.len(), cache.by_end.len()), (2, 2));
        // A flood of what is good for a short time only.
        cache.keep(key(b"b"), 9, seconds(120));
        for number in 0..100_usize {
            cache.keep(key(&number.to_ne_bytes()), number, seconds(10));
        }
        assert_eq!((known(&cache, "b"), cache.answers.len()), (Some(9), 2));
    }

    #[tokio::test]
    async fn what_many_ask_at_once_is_asked_once() {
        let asked: Asked<u32> = Asked::new(8, 4);
        let times = sync::atomic::AtomicU32::new(0);
        let ask = || {
            let ask = async {
                tokio::task::yield_now().await;
                Ok(times.fetch_add(1, sync::atomic::Ordering::SeqCst))
            };
            asked.get::<Silence>(b"who is it?", ask, |_| seconds(60))
        };
        let answers = futures_util::future::join_all((0..20).map(|_| ask())).await;
        assert!(answers.into_iter().all(|answer| matches!(answer, Ok(0))));
    }
}
