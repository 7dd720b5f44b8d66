//! What happens to the machines: all that may go wrong, by chance, and the clear weather in which everything comes to rest.

use super::cloud::Replica;
use super::desk::NODE;
use super::mutations::Mutation;
use super::node::Disk;
use super::world::World;
use super::*;

/// Steps within which everything comes to rest once the weather is clear.
const PATIENCE: usize = 4000;

impl World {
    /// The edge's process dies, with or without what was being written, and starts again from its disk.
    pub(super) fn crash_edge(&mut self) {
        let survived = self.dice.roll(self.node.jobs.len() + 1);
        for job in std::mem::take(&mut self.node.jobs).into_iter().take(survived) {
            self.node.write(&self.apiserver, job);
        }
        self.disconnect();
        if !self.is(Mutation::MachineKept) {
            self.node.boot(self.now);
        }
    }

    /// The disk is another one: a new one, or an old copy of it, with its outbox and its numbers. Things go on meanwhile.
    pub(super) fn replace_disk(&mut self, by: Disk) {
        // It takes longer than sessions that followed each other within milliseconds had their epochs run ahead of the clock: whoever has
        // forgotten its epoch gets one from a clock.
        self.pass_time(Duration::from_secs(1));
        self.crash_edge();
        self.node.disk = by;
        self.disk_replaced();
        for _ in 0..self.dice.roll(3) {
            self.node.change(&mut self.dice);
        }
        self.node.boot(self.now);
    }

    /// A row is lost, and nobody notices; then something else of its collection comes.
    pub(super) fn lose_row(&mut self) {
        if let Some(order) = self.node.lose_row(&mut self.dice) {
            self.apiserver.add(&mut self.dice, order);
        }
    }

    /// One random thing happens.
    pub(super) fn chaos(&mut self) {
        if self.dice.one_in(5) {
            self.neighbours_go_on();
        }
        let at = self.dice.roll(self.replicas.len());
        match self.dice.roll(1000) {
            0..10 => self.flow(),
            10..250 => {
                let which = self.dice.roll(self.connections.len());
                self.deliver_up(which);
            }
            250..500 => self.deliver_down(),
            500..600 => self.commit(),
            600..700 => {
                for _ in 0..=self.dice.roll(12) {
                    self.feed(at);
                }
            }
            700..720 => self.claim(at),
            720..723 => {
                let collection = self.dice.pick(&COLLECTIONS);
                if let Some(session) = &mut self.replicas[at].session {
                    let out = session.hub.ask(collection);
                    self.hub_outputs(at, out);
                }
            }
            723..767 => {
                let order = self.dice.roll(COLLECTIONS.len());
                for _ in 0..=self.dice.roll(3) {
                    self.replicas[at].watch(&self.apiserver, order);
                }
            }
            767..770 => self.watch_node(at),
            770..772 => self.renew(at),
            772..774 => drop(self.see(at)),
            774..785 => {
                let marked = !self.is(Mutation::FetchUnmarked);
                self.replicas[at].fetch(&self.apiserver, &mut self.dice, marked);
            }
            785..830 => {
                for _ in 0..self.dice.pick(&[1, 1, 2, 7]) {
                    self.go_on(at);
                }
                self.tell_ends(at, NODE);
            }
            830..845 => self.apiserver.create(&mut self.dice),
            845..880 => {
                if let Some((id, key)) = self.apiserver.pick(&mut self.dice) {
                    self.apiserver.write(&mut self.dice, &id, &key);
                }
            }
            880..897 => {
                if let Some((id, _)) = self.apiserver.pick(&mut self.dice) {
                    self.apiserver.delete(&id);
                }
            }
            897..930 => self.observe(),
            930..937 => self.report_again(),
            937..950 => {
                let by = self.dice.roll(20_000);
                self.pass_time(Duration::from_millis(by.try_into().unwrap()));
            }
            955..977 => self.connect(),
            977..983 => {
                let (up, down) = (self.dice.one_in(2), self.dice.one_in(2));
                let current = self.current;
                if let Some(connection) = current.and_then(|id| self.connection(id)) {
                    connection.is_up_lost |= up;
                    connection.is_down_lost |= down || !up;
                }
            }
            983..989 => self.crash_edge(),
            // A replica dies and lists everything again; nobody says goodbye.
            989..992 => {
                self.end_session(at, None);
                let Replica { skew, salt, .. } = self.replicas[at];
                self.replicas[at] = Replica::new(&self.apiserver).with_clock(skew, salt);
                self.neighbours_connect(|other| other.replica == at);
            }
            992..994 if self.same_clocks => self.replace_disk(Disk::default()),
            950..955 | 992..994 => self.disconnect(),
            994..995 => self.node.rot(&mut self.dice),
            995..997 => self.node.backup = Some(self.node.disk.clone()),
            _ => {
                if let Some(backup) = self.node.backup.take_if(|_| self.same_clocks) {
                    self.replace_disk(backup);
                }
            }
        }
    }

    /// A session does all that it can do before its node's disk is replaced, and goes on beside the one that comes then: by chance alone both
    /// hardly ever get anywhere.
    pub(super) fn begin_anew(&mut self) {
        if !self.same_clocks {
            return;
        }
        for _ in 0..2 {
            self.connect();
            for _ in 0..self.dice.roll(60) {
                let (at, which) = (self.dice.roll(self.replicas.len()), self.dice.roll(self.connections.len()));
                match self.dice.roll(10) {
                    0..3 => self.deliver_up(which),
                    3..5 => self.deliver_down(),
                    5 => self.observe(),
                    6 => self.claim(at),
                    7 => self.watch_node(at),
                    _ => {
                        self.go_on(at);
                        self.tell_ends(at, NODE);
                    }
                }
            }
            self.replace_disk(Disk::default());
        }
    }

    /// For a while all goes well on the connection that the node uses, and nothing happens elsewhere.
    fn flow(&mut self) {
        for _ in 0..self.dice.roll(20) {
            let Some(which) = self.connections.iter().position(|connection| Some(connection.id) == self.current) else {
                return;
            };
            let at = self.connections[which].replica;
            self.deliver_up(which);
            self.feed(at);
            self.claim(at);
            self.go_on(at);
            self.tell_ends(at, NODE);
            self.report_again();
            self.deliver_down();
            self.commit();
        }
    }

    /// The weather clears: everything that is on its way arrives.
    pub(super) fn settle(&mut self) {
        self.connect();
        if !self.dice.one_in(4) {
            // What was given back to them need not wait.
            self.neighbours_connect(|_| true);
        }
        self.settle_on();
    }

    /// Until nothing is on its way, on the connection that stands; on a new one when that ends.
    pub(super) fn settle_on(&mut self) {
        (self.is_clear, self.apiserver.is_down) = (true, false);
        for _ in 0..PATIENCE {
            if self.current.is_none() {
                self.connect();
            }
            for which in 0..self.connections.len() {
                self.deliver_up(which);
            }
            self.report_again();
            let mut quiet = self.node.jobs.is_empty() && self.node.unsaid.is_empty();
            for at in 0..self.replicas.len() {
                for order in 0..COLLECTIONS.len() {
                    quiet &= !self.replicas[at].watch(&self.apiserver, order);
                }
                self.feed(at);
                self.watch_node(at);
                self.claim(at);
                self.renew(at);
                self.go_on(at);
                self.tell_ends(at, NODE);
                quiet &= !self.see(at);
            }
            quiet &= self.neighbours_settle();
            self.deliver_down();
            self.commit();
            let current = self.current;
            let Some(connection) = current.and_then(|id| self.connection(id)) else { continue };
            quiet &= connection.up.is_empty() && connection.down.is_empty();
            let at = connection.replica;
            if quiet
                && let Some(session) = &self.replicas[at].session
                && Some(session.connection) == current
                && session.untold.is_empty()
                && session.desk.rests()
                && self.apiserver.lease == session.epoch
            {
                if self.node.disk.outbox.is_empty() && session.desk.is_empty() && self.neighbours_are_done() {
                    return;
                }
                // What was given back waits for its time, or is to be tried again.
                self.pass_time(Duration::from_secs(5));
            }
        }
        panic!("it does not come to rest");
    }
}
