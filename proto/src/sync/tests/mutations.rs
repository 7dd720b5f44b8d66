//! Ways to break a machine or what carries it. Each has to be noticed, or the schedules prove nothing.

use std::panic;

use super::run;

/// Schedules within which each is noticed.
const SCHEDULES: u64 = 40_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutation {
    /// The edge takes what it received for durable.
    AckBeforeCommit,
    /// A commit speaks for the batches behind it too.
    TicketOfLast,
    /// The disk loses a batch and says that it has it.
    BatchLost,
    /// The machine goes on with what its store has lost, or could not apply.
    MachineKept,
    /// A delta is applied to whatever there is.
    DeltaUnchecked,
    /// What was not said yet counts as absent, and so as to be deleted.
    CompleteTooEarly,
    /// A replica does not ask how new what the edge holds is.
    RevisionsIgnored,
    /// The edge does not store how new what it holds is.
    RevisionsForgotten,
    /// Each collection is looked at alone.
    RevisionsApart,
    /// What was asked for beside the watch counts for no newer.
    FetchUnmarked,
    /// Each replica counts epochs by itself.
    EpochOfOwn,
    /// The first session of a node writes though the Node names none.
    FirstUnclaimed,
    /// One that began when the Node named none writes though it names another one since.
    OthersUnclaimed,
    /// A session that finds a newer one's lease stops renewing, and goes on.
    RenewalsDropped,
    /// A session writes without looking whether a newer one took over.
    EpochUnread,
    /// It looks before it reads what it is going to replace.
    EpochReadTooEarly,
    /// Frames of an older connection get to the machine.
    OldConnection,
    /// Frames of an older connection get to the session of a newer one.
    OldConnectionUp,
    /// The edge leaves out some of what it is asked whether it holds.
    InventoryCut,
    /// A new session does not send again what was not answered.
    ReportForgotten,
    /// What is sent again passes for new.
    ReportTwice,
    /// A report is acknowledged before the apiserver has it.
    ReportAckedEarly,
    /// The edge forgets what the cloud could not take.
    GivenBackForgotten,
    /// A kubelet that starts reports only what its notes do not say.
    NotesBelieved,
    /// The Node and devices are written over whatever they show.
    VersionUnread,
    /// An event is given the count of whatever report comes last.
    EventOverwritten,
    /// The edge deletes what has the name, and not the UID alone.
    DeleteByKey,
    /// The edge keeps to itself that its digest is another one.
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
    /// An inbox keeps the older report of two about the same.
    NewerDropped,
    /// What was tried in vain goes again though a newer one came meanwhile.
    OlderTriedAgain,
    /// What the apiserver fails over counts as taken.
    FailureAcked,
    /// What was tried in vain is forgotten.
    AgainLost,
    /// What is tried again is written without a look whether it was before.
    AgainUnread,
    /// How often a report was tried is forgotten.
    TriedForEver,
    /// What a full inbox cannot take is refused for good.
    CrowdedRefused,
    /// Who comes last has the next turn.
    TurnsJumped,
    /// Who has a turn keeps it for as long as it has anything to say.
    TurnKept,
}

const ALL: [Mutation; 43] = [
    Mutation::AckBeforeCommit,
    Mutation::TicketOfLast,
    Mutation::BatchLost,
    Mutation::MachineKept,
    Mutation::DeltaUnchecked,
    Mutation::CompleteTooEarly,
    Mutation::RevisionsIgnored,
    Mutation::RevisionsForgotten,
    Mutation::RevisionsApart,
    Mutation::FetchUnmarked,
    Mutation::EpochOfOwn,
    Mutation::FirstUnclaimed,
    Mutation::OthersUnclaimed,
    Mutation::RenewalsDropped,
    Mutation::EpochUnread,
    Mutation::EpochReadTooEarly,
    Mutation::OldConnection,
    Mutation::OldConnectionUp,
    Mutation::InventoryCut,
    Mutation::ReportForgotten,
    Mutation::ReportTwice,
    Mutation::ReportAckedEarly,
    Mutation::GivenBackForgotten,
    Mutation::NotesBelieved,
    Mutation::VersionUnread,
    Mutation::EventOverwritten,
    Mutation::DeleteByKey,
    Mutation::DigestIgnored,
    Mutation::AckBeyondCommit,
    Mutation::DigestUnsent,
    Mutation::BeforeComplete,
    Mutation::BaseUnheld,
    Mutation::OlderKept,
    Mutation::OlderLast,
    Mutation::NewerDropped,
    Mutation::OlderTriedAgain,
    Mutation::FailureAcked,
    Mutation::AgainLost,
    Mutation::AgainUnread,
    Mutation::TriedForEver,
    Mutation::CrowdedRefused,
    Mutation::TurnsJumped,
    Mutation::TurnKept,
];

#[test]
fn what_is_broken_is_noticed() {
    for mutation in ALL {
        let noticed = (0..SCHEDULES).find(|seed| panic::catch_unwind(|| run(*seed, Some(mutation))).is_err());
        eprintln!("{mutation:?}: {noticed:?}");
        assert!(noticed.is_some(), "{SCHEDULES} schedules do not notice {mutation:?}");
    }
}
