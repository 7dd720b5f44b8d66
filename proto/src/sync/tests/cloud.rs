//! The apiserver, and the replicas of the cloud that watch it: each sees each collection's changes in order, and as late as it may be.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::desk::{Desk, NODE, Turns};
use super::node::{self, Said, Subject};
use super::*;
use crate::wire;

/// Rank in [`COLLECTIONS`], and UID.
pub(super) type Id = (usize, String);

pub(super) const CONFIG_MAPS: usize = 4;
pub(super) const SECRETS: usize = 5;
pub(super) const TOKENS: usize = 6;
pub(super) const PODS: usize = 7;

#[derive(Default)]
pub(super) struct Apiserver {
    revision: u64,
    pub(super) objects: BTreeMap<Id, Object>,
    /// Every change of each collection.
    log: [Vec<Change>; COLLECTIONS.len()],
    /// Every state of each object, by UID.
    pub(super) states: BTreeMap<String, Vec<u64>>,
    /// Whether a pod refers to a ConfigMap, by its key: how that changed.
    pub(super) referred: BTreeMap<String, Vec<bool>>,
    /// The epoch on the Node, compared and set.
    pub(super) epoch: u64,
    /// Which start of the agent that is.
    pub(super) agent: String,
    /// The one on its lease, which is only set.
    pub(super) lease: u64,
    /// What each object shows of its status, and the version of that. The Node's is that of its epoch too.
    pub(super) statuses: BTreeMap<Subject, Status>,
    /// Events by name, and how often each happened.
    pub(super) events: BTreeMap<String, u64>,
    next_uid: u64,
    /// It takes nothing.
    pub(super) is_down: bool,
}

#[derive(Clone)]
struct Change {
    revision: u64,
    uid: String,
    /// `None`: it was deleted.
    object: Option<Object>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Status {
    pub(super) said: Said,
    /// Of the session that wrote it.
    pub(super) epoch: u64,
    /// How often it was written.
    pub(super) version: u64,
}

/// One cloudcore.
#[derive(Default)]
pub(super) struct Replica {
    /// How many changes of each collection it has seen.
    seen: [usize; COLLECTIONS.len()],
    reached: [u64; COLLECTIONS.len()],
    newest: [u64; COLLECTIONS.len()],
    cache: BTreeMap<Id, Object>,
    /// What was asked for beside the watch, and as of when: older changes of it are no news.
    fetched: BTreeMap<Id, u64>,
    pub(super) session: Option<Session>,
    /// How far its clock is ahead, in milliseconds.
    pub(super) skew: u64,
    /// What the last digit of its epochs is: no two replicas give the same.
    pub(super) salt: u64,
    /// The highest epoch that it has seen on the Node or its lease.
    pub(super) known: u64,
    /// Which start of the agent the Node names.
    pub(super) agent: String,
    /// That of its last session which the Node names, or whose node nobody else had since, and which start of the agent that was.
    pub(super) here: (u64, String),
    /// The last one that it gave.
    pub(super) given: u64,
    /// Versions of the Node, as the watch shows it, and of what sessions here have written, but for pods.
    pub(super) versions: BTreeMap<Subject, u64>,
    pub(super) turns: Turns,
}

pub(super) struct Session {
    pub(super) connection: u64,
    pub(super) epoch: u64,
    /// Which start of the agent it is.
    pub(super) run: String,
    /// It is to write its epoch on the Node before it reports anything.
    pub(super) claims: bool,
    pub(super) hub: Hub,
    /// What the closure is to say, in order.
    pub(super) untold: VecDeque<HubInput>,
    /// What the edge should hold once that is said.
    pub(super) told: BTreeMap<Id, Entry>,
    pub(super) desk: Desk,
    /// Of each pod, what the apiserver took.
    pub(super) taken: BTreeMap<Subject, u8>,
    /// Of those, what the edge was asked to report once more, because something else shows.
    pub(super) asked: BTreeSet<Subject>,
}

/// The key of the ConfigMap that a pod needs.
fn needed_by(pod: &str) -> String {
    format!("ns/{}", pod.trim_start_matches('u').parse::<u64>().map_or(0, |n| n % 4))
}

fn refers(objects: &BTreeMap<Id, Object>, key: &str) -> bool {
    objects.range((PODS, String::new())..(PODS + 1, String::new())).any(|((_, pod), _)| needed_by(pod) == key)
}

/// What of `objects` belongs on the node.
fn belongs(objects: &BTreeMap<Id, Object>, id: &Id) -> bool {
    objects.get(id).is_some_and(|object| id.0 != CONFIG_MAPS || refers(objects, &object.entry.key))
}

impl Apiserver {
    pub(super) fn create(&mut self, dice: &mut Dice) {
        let order = if dice.one_in(2) { dice.roll(COLLECTIONS.len()) } else { dice.pick(&[CONFIG_MAPS, PODS]) };
        self.next_uid += 1;
        let uid = format!("u{}", self.next_uid);
        // Few names, so that the same name comes back under another UID.
        let key = format!("ns/{}", dice.roll(4));
        let old = self.objects.iter().find(|((at, _), object)| *at == order && object.entry.key == key);
        if let Some(id) = old.map(|(id, _)| id.clone()) {
            self.delete(&id);
        }
        self.write(dice, &(order, uid), &key);
    }

    /// A new object under a name of its own.
    pub(super) fn add(&mut self, dice: &mut Dice, order: usize) {
        self.next_uid += 1;
        let uid = format!("u{}", self.next_uid);
        let key = format!("ns/{uid}");
        self.write(dice, &(order, uid), &key);
    }

    /// A new state of an object, from a few bytes to more than the window.
    pub(super) fn write(&mut self, dice: &mut Dice, id: &Id, key: &str) {
        let json = match self.objects.get(id) {
            // A letter of what is there already, or all of it.
            Some(before) if !dice.one_in(4) => {
                let mut json = decode(before.encoding, &before.payload).unwrap();
                let at = 1 + dice.roll(json.len() - 2);
                json[at] = b'a' + u8::try_from(dice.roll(26)).unwrap();
                json
            }
            _ => {
                let size = dice.pick(&[1, 1, 100, 300, 700, 2500]);
                serde_json::to_vec(dice.letters(size)).unwrap()
            }
        };
        self.put(id, key, &json);
    }

    pub(super) fn put(&mut self, id: &Id, key: &str, json: &[u8]) {
        let mut object = Object::new(COLLECTIONS[id.0], key.to_owned(), id.1.clone(), json);
        if let Some(before) = self.objects.get(id) {
            object = object.succeeding(before);
        }
        self.states.entry(id.1.clone()).or_default().push(object.entry.version);
        self.objects.insert(id.clone(), object.clone());
        self.note(id, Some(object));
    }

    pub(super) fn delete(&mut self, id: &Id) {
        if self.objects.remove(id).is_some() {
            self.note(id, None);
        }
    }

    fn note(&mut self, (order, uid): &Id, object: Option<Object>) {
        self.revision += 1;
        self.log[*order].push(Change { revision: self.revision, uid: uid.clone(), object });
        if *order == PODS {
            let key = needed_by(uid);
            let now = refers(&self.objects, &key);
            let history = self.referred.entry(key).or_insert_with(|| vec![false]);
            if history.last() != Some(&now) {
                history.push(now);
            }
        }
    }

    pub(super) fn pick(&self, dice: &mut Dice) -> Option<(Id, String)> {
        let at = dice.roll(self.objects.len());
        self.objects.iter().nth(at).map(|(id, object)| (id.clone(), object.entry.key.clone()))
    }

    /// What the node should hold.
    pub(super) fn desired(&self) -> BTreeMap<Id, Entry> {
        let mine = self.objects.iter().filter(|(id, _)| belongs(&self.objects, id));
        mine.map(|(id, object)| (id.clone(), object.entry.clone())).collect()
    }

    /// Forgets everything about objects.
    pub(super) fn clear(&mut self) {
        let (agent, lease) = (std::mem::take(&mut self.agent), self.lease);
        *self = Self { revision: self.revision, epoch: self.epoch, agent, lease, ..Self::default() };
    }
}

impl Replica {
    /// A cloudcore that has just listed everything.
    pub(super) fn new(apiserver: &Apiserver) -> Self {
        let mut replica = Self { cache: apiserver.objects.clone(), ..Self::default() };
        replica.see_node(apiserver);
        for (order, log) in apiserver.log.iter().enumerate() {
            replica.seen[order] = log.len();
            replica.reached[order] = log.last().map_or(0, |change| change.revision);
        }
        replica.newest = replica.reached;
        replica
    }

    pub(super) fn with_clock(self, skew: u64, salt: u64) -> Self {
        Self { skew, salt, ..self }
    }

    /// Its session is over, and what was being done for it.
    pub(super) fn end(&mut self) -> Option<Session> {
        self.turns.leave(NODE);
        self.session.take()
    }

    /// The watch of Nodes shows what there is.
    pub(super) fn see_node(&mut self, apiserver: &Apiserver) {
        self.known = self.known.max(apiserver.epoch);
        self.agent.clone_from(&apiserver.agent);
        let version = apiserver.statuses.get(&node::node()).map_or(0, |shown| shown.version);
        self.versions.insert(node::node(), version);
    }

    /// The Node names its session.
    pub(super) fn has_claimed(&mut self, apiserver: &Apiserver) {
        self.see_node(apiserver);
        self.here = (apiserver.epoch, apiserver.agent.clone());
    }

    /// A session begins: its epoch, and whether it has to claim the node.
    pub(super) fn epoch(&mut self, last: u64, run: &str, now: Duration) -> (u64, bool) {
        let clock = u64::try_from(now.as_millis()).unwrap() + self.skew;
        let lowest = clock.max(last.max(self.known).max(self.here.0).max(self.given) + 1);
        self.given = (lowest..).find(|epoch| epoch % 10 == self.salt).unwrap();
        // An agent that started anew may have a store that was put back, and not know where it was since.
        let claims = if last == 0 {
            self.known != 0
        } else {
            (last.max(self.known), run) != (self.here.0, self.here.1.as_str())
        };
        if !claims {
            self.here = (self.given, run.to_owned());
        }
        (self.given, claims)
    }

    /// The next change of a collection comes, or if there is none, a bookmark. Answers whether that is news.
    pub(super) fn watch(&mut self, apiserver: &Apiserver, order: usize) -> bool {
        let Some(Change { revision, uid, object }) = apiserver.log[order].get(self.seen[order]).cloned() else {
            let is_news = self.reached[order] < apiserver.revision;
            if is_news {
                self.reached[order] = apiserver.revision;
                self.tell(HubInput::Reached(COLLECTIONS[order], apiserver.revision));
            }
            return is_news;
        };
        self.seen[order] += 1;
        self.see_up_to(order, revision);
        let id = (order, uid);
        if self.fetched.get(&id).is_none_or(|fetched| *fetched < revision) {
            self.set(&id, object);
        }
        self.reached[order] = self.reached[order].max(revision);
        self.tell(HubInput::Reached(COLLECTIONS[order], self.reached[order]));
        true
    }

    /// One object is asked for, whatever the watch has shown.
    pub(super) fn fetch(&mut self, apiserver: &Apiserver, dice: &mut Dice, marked: bool) {
        let order = dice.pick(&[CONFIG_MAPS, SECRETS]);
        let log = &apiserver.log[order];
        let Some(change) = log.get(dice.roll(log.len())) else { return };
        let id = (order, change.uid.clone());
        let last = log.iter().rfind(|change| change.uid == id.1);
        // That something is not there has no revision of its own.
        let revision = last.filter(|last| last.object.is_some()).map_or(apiserver.revision, |last| last.revision);
        if revision <= self.reached[order] {
            return;
        }
        if marked {
            self.see_up_to(order, revision);
        }
        self.fetched.insert(id.clone(), revision);
        self.set(&id, apiserver.objects.get(&id).cloned());
    }

    fn see_up_to(&mut self, order: usize, revision: u64) {
        self.newest[order] = self.newest[order].max(revision);
        self.tell(HubInput::Newest(COLLECTIONS[order], revision));
    }

    fn set(&mut self, id: &Id, object: Option<Object>) {
        match object {
            Some(object) => self.cache.insert(id.clone(), object),
            None => self.cache.remove(id),
        };
        self.look(id);
        if id.0 == PODS {
            let key = needed_by(&id.1);
            let maps = (CONFIG_MAPS, String::new())..(SECRETS, String::new());
            let mut touched: Vec<Id> = self
                .cache
                .range(maps.clone())
                .filter(|(_, map)| map.entry.key == key)
                .map(|(id, _)| id.clone())
                .collect();
            if let Some(session) = &self.session {
                touched.extend(session.told.range(maps).filter(|(_, map)| map.key == key).map(|(id, _)| id.clone()));
            }
            touched.iter().for_each(|id| self.look(id));
        }
    }

    /// Has the session said what is true now of one object.
    fn look(&mut self, id: &Id) {
        let belongs = belongs(&self.cache, id);
        let Some(session) = &mut self.session else { return };
        let told = session.told.get(id);
        match self.cache.get(id).filter(|_| belongs) {
            Some(object) if told != Some(&object.entry) => {
                session.told.insert(id.clone(), object.entry.clone());
                session.untold.push_back(HubInput::Desired(object.clone().into()));
            }
            None if told.is_some() => {
                session.told.remove(id);
                session.untold.push_back(HubInput::Gone(COLLECTIONS[id.0], id.1.clone()));
            }
            _ => {}
        }
    }

    /// The edge says what it holds: what it was to keep and has not got is given.
    pub(super) fn answer(&mut self, collection: Collection, held: &[Entry]) {
        let Some(session) = self.session.as_mut().filter(|_| rank(collection) == Some(TOKENS)) else { return };
        for (id, entry) in session.told.range((TOKENS, String::new())..(PODS, String::new())) {
            if let Some(object) = self.cache.get(id).filter(|_| !held.contains(entry)) {
                session.untold.push_back(HubInput::Desired(object.clone().into()));
            }
        }
    }

    /// The delta that makes this version of an object of the one before.
    pub(super) fn delta(&self, upsert: &wire::Upsert) -> Option<Delta> {
        let object = self.cache.get(&(rank(upsert.collection())?, upsert.uid.clone()))?;
        object.delta.clone().filter(|_| object.entry.version == upsert.version)
    }

    fn tell(&mut self, input: HubInput) {
        if let Some(session) = &mut self.session {
            session.untold.push_back(input);
        }
    }

    /// What a session says first, in this order: how new it may be, what belongs on the node, and that this is all.
    pub(super) fn begin(&mut self, mut session: Session, dice: &mut Dice, too_early: bool) {
        let mine = self.cache.iter().filter(|(id, _)| belongs(&self.cache, id));
        let mut objects: Vec<HubInput> = Vec::new();
        for (id, object) in mine {
            session.told.insert(id.clone(), object.entry.clone());
            // A token that the edge may hold is not minted again.
            objects.push(if id.0 == TOKENS && dice.one_in(2) {
                HubInput::Keep(object.collection, object.entry.clone())
            } else {
                HubInput::Desired(object.clone().into())
            });
        }
        dice.shuffle(&mut objects);
        let mut ends: Vec<HubInput> = Vec::new();
        for (order, collection) in COLLECTIONS.into_iter().enumerate() {
            session.untold.push_back(HubInput::Newest(collection, self.newest[order]));
            ends.push(HubInput::Reached(collection, self.reached[order]));
            ends.push(HubInput::Complete(collection));
        }
        dice.shuffle(&mut ends);
        let (first, then) = if too_early { (ends, objects) } else { (objects, ends) };
        session.untold.extend(first.into_iter().chain(then));
        self.session = Some(session);
    }
}
