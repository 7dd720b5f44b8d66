//! Ways in which a test breaks the machines themselves. Outside of tests nothing is ever broken.

/// One way to break a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The edge deletes what has the name, and not the UID alone.
    DeleteByKey,
    /// The edge believes that it agrees, whatever the digest says.
    DigestIgnored,
    /// The edge takes a commit for that of all that it has asked for.
    AckBeyondCommit,
    /// The hub has no digest compared.
    DigestUnsent,
    /// The hub sends and deletes before all has been said that is to stay.
    BeforeComplete,
    /// The hub counts on a state that the edge need not hold.
    BaseUnheld,
    /// The outbox keeps the older report of two about the same.
    OlderKept,
    /// What was not answered goes again behind what is newer.
    OlderLast,
}

#[cfg(test)]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Breaks every machine of this thread so, from now on.
#[cfg(test)]
pub(super) fn set(fault: Option<Fault>) {
    BROKEN.set(fault);
}

/// Whether the machines are broken so.
#[cfg(test)]
pub(super) fn is(fault: Fault) -> bool {
    BROKEN.get() == Some(fault)
}

/// Whether the machines are broken so.
#[cfg(not(test))]
#[inline]
pub(super) const fn is(_fault: Fault) -> bool {
    false
}
