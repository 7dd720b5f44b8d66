//! A thousand connections that break wherever they are, in an order that a seed gives: `SEED=n` replays it.

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use super::*;

const ROUNDS: usize = 1000;
/// About what the cloud sends until it has TLS.
const HANDSHAKE: usize = 890;
/// About an answer to the upgrade, in TLS.
const UPGRADE: usize = 150;

/// Where a connection breaks.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// When it is accepted.
    Accepted,
    /// In the middle of TLS.
    Tls,
    /// Before the answer to the upgrade, or in the middle of it.
    Upgrade,
    /// After the Hello.
    Hello,
    /// In the middle of what the cloud sends then.
    Batch,
    /// In sync.
    InSync,
    /// In sync, with streams open both ways.
    Streams,
}

const STAGES: [Stage; 7] =
    [Stage::Accepted, Stage::Tls, Stage::Upgrade, Stage::Hello, Stage::Batch, Stage::InSync, Stage::Streams];

#[tokio::test]
async fn a_thousand_broken_connections_leave_one_and_nothing_else() {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("SEED={seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut bed = Bed::new().await;
    let wanted: Vec<Object> = (0..8).map(|n| noise(&mut dice, &format!("o{n}"))).collect();
    let mut peer = bed.accept().await;
    let (mut last, _) = serve(&mut peer, &wanted, 0).await;
    let before = (tasks(), sockets(&bed), held(&bed).await);
    assert_eq!((before.1, before.2.len()), ((1, 2), 8), "one connection, and who listens");
    drop(peer);
    for _ in 0..ROUNDS {
        let stage = STAGES[dice.random_range(0..STAGES.len())];
        if let Some(epoch) = round(&mut bed, &mut dice, stage, &wanted, last).await {
            last = epoch;
        }
    }
    let mut peer = reached(&bed).await;
    let (epoch, _) = serve(&mut peer, &wanted, 0).await;
    assert!(epoch > last, "epochs only rise: {epoch} after {last}");
    bed.state(|state| matches!(state, LinkState::Online { epoch: shown, .. } if *shown == epoch)).await;
    let after = (tasks(), sockets(&bed), held(&bed).await);
    assert!(after.0 <= before.0, "{} tasks, {} before", after.0, before.0);
    assert_eq!((after.1, after.2), (before.1, before.2));
    bed.end().await;
}

/// A connection that breaks there; the session's epoch if it was in sync.
async fn round(bed: &mut Bed, dice: &mut StdRng, stage: Stage, wanted: &[Object], last: u64) -> Option<u64> {
    let is_reset: bool = dice.random();
    if let Stage::Accepted | Stage::Tls | Stage::Upgrade = stage {
        let stream = bed.dialled().await;
        reset_when_dropped(&stream, is_reset);
        let left = match stage {
            Stage::Accepted => return None,
            Stage::Tls => dice.random_range(0..HANDSHAKE),
            _ => usize::MAX,
        };
        let mut stream = bed.tls(stream, left).await?;
        stream.get_mut().0.left = dice.random_range(0..UPGRADE);
        let _ = tokio_tungstenite::accept_async(stream).await;
        return None;
    }
    let mut peer = reached(bed).await;
    reset_when_dropped(&peer.socket.get_ref().get_ref().0.stream, is_reset);
    let hello = hello(&mut peer).await;
    assert!(hello.last_epoch >= last, "the edge forgot the epoch {last}: {hello:?}");
    match stage {
        Stage::Hello => return None,
        Stage::Batch => {
            let more: Vec<Object> = (0..5).map(|n| noise(dice, &format!("more-{n}"))).collect();
            let bytes = more.iter().map(|object| object.payload.len()).sum();
            peer.break_after(dice.random_range(0..bytes));
            let all = [wanted, &more].concat();
            return until_broken(&mut peer, &hello, &all, 0).await.map(|(epoch, _)| epoch);
        }
        _ => {}
    }
    let (epoch, _) = welcome(&mut peer, &hello, wanted, 0).await;
    bed.state(|state| matches!(state, LinkState::Online { epoch: shown, .. } if *shown == epoch)).await;
    if let Stage::Streams = stage {
        let cloud = peer.carrier.streams();
        let (streams, incoming) = (&bed.streams, &mut bed.incoming);
        let story = async {
            let mut ours = streams.open(Class::Api, Bytes::new()).unwrap();
            ours.write_all(b"half of it").await.unwrap();
            let theirs = cloud.open(Class::Ops, Bytes::new()).unwrap();
            let served = incoming.recv().await.unwrap().stream;
            (ours, theirs, served)
        };
        let (mut ours, _theirs, mut served) =
            tokio::select! { open = story => open, () = peer.carry() => panic!("the link ended the session") };
        drop(peer);
        for stream in [&mut ours, &mut served] {
            while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
        }
    }
    Some(epoch)
}

/// The connection ends with a reset, if it is to, and otherwise as its end finds it.
fn reset_when_dropped(stream: &TcpStream, is_reset: bool) {
    if is_reset {
        stream.set_zero_linger().unwrap();
    }
}

/// The link's next connection, with TLS and its upgrade. One that was given up for news comes again.
async fn reached(bed: &Bed) -> Peer {
    loop {
        if let Some(peer) = bed.upgrade(bed.dialled().await).await {
            return peer;
        }
    }
}

/// An object that does not get much smaller when it is compressed.
fn noise(dice: &mut StdRng, name: &str) -> Object {
    let mut content = vec![0; dice.random_range(10..2000)];
    dice.fill_bytes(&mut content);
    object(Collection::ConfigMaps, name, &hex::encode(content))
}

/// Tasks of this test's own runtime.
fn tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// Sockets that somebody has open: the link's, which end at the bed's port, and the cloud's, which have it. Other tests of this process
/// have other ports.
fn sockets(bed: &Bed) -> (usize, usize) {
    let port = format!(":{:04X}", bed.listener.local_addr().unwrap().port());
    let tables =
        ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/self/net/{table}")).unwrap_or_default());
    let (mut near, mut far) = (0, 0);
    for line in tables.iter().flat_map(|table| table.lines().skip(1)) {
        let fields: Vec<_> = line.split_whitespace().collect();
        // Of what nobody has open any more the kernel knows no inode.
        if fields[9] != "0" {
            near += usize::from(fields[2].ends_with(&port));
            far += usize::from(fields[1].ends_with(&port));
        }
    }
    (near, far)
}

/// What the store holds.
async fn held(bed: &Bed) -> Vec<String> {
    let mut held: Vec<_> = bed.store.index().await.unwrap().iter().map(|row| format!("{row:?}")).collect();
    held.sort();
    held
}
