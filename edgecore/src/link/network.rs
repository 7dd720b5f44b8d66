//! Notices that the network may be back, or be another one: a default route, an address or a carrier appeared. Who waits to try again need
//! not wait longer, who dials starts over, and who has a session asks whether it still lives.
//!
//! The kernel tells it by rtnetlink. Pods that come and go change links, addresses and routes too, on veths and bridges; those say
//! nothing about the way to the cloud and do not count. While the kernel cannot be listened to, waits last as long as they last.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use tokio::net::UnixDatagram;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::clock;

/// What belongs together comes together: it is waited for so long after the last of it.
const SETTLE: Duration = Duration::from_millis(200);
/// Not told more often than this, and not later than this after the first of a burst.
const PACE: Duration = Duration::from_secs(1);
/// No message is larger; of a larger one the beginning is read.
const BUFFER: usize = 16 << 10;
/// How long after the kernel would not be listened to it is tried again: a box may just have been out of memory.
const AGAIN: Duration = Duration::from_secs(60);
/// Interfaces that are known at once.
const MAX_INTERFACES: usize = 4096;
/// Addresses that are known at once.
const MAX_ADDRESSES: usize = 1024;

/// Counts up in `back` whenever the network may be back, until the shutdown.
pub async fn run(back: watch::Sender<u64>, shutdown: CancellationToken) {
    let mut was_said = false;
    let listening = async {
        loop {
            let begun = clock::monotonic();
            let Err(error) = listen(&back).await;
            let was_heard = clock::monotonic().saturating_sub(begun) > AGAIN;
            if !std::mem::replace(&mut was_said, true) {
                warn!(%error, "changes of the network are not heard of, waits for it last their time; it is tried again every minute");
            }
            tokio::time::sleep(AGAIN).await;
            if was_heard {
                // What happened meanwhile is not known.
                back.send_modify(|count| *count = count.wrapping_add(1));
            }
        }
    };
    tokio::select! {
        () = listening => {}
        () = shutdown.cancelled() => {}
    }
}

async fn listen(back: &watch::Sender<u64>) -> io::Result<Infallible> {
    let socket = subscribe()?;
    ask_for_interfaces(&socket).await?;
    let mut interfaces = Interfaces::default();
    let mut burst = Burst::default();
    let mut buffer = vec![0; BUFFER];
    loop {
        let due = burst.due().map(|due| due.saturating_sub(clock::monotonic()));
        let read = tokio::select! {
            read = socket.recv(&mut buffer) => read,
            () = async { tokio::time::sleep(due.unwrap_or_default()).await }, if due.is_some() => {
                burst.told(clock::monotonic());
                back.send_modify(|count| *count = count.wrapping_add(1));
                continue;
            }
        };
        match read {
            Ok(length) => {
                if interfaces.hear(&buffer[..length]) {
                    burst.add(clock::monotonic());
                }
            }
            // More happened than the kernel keeps: what that was is not known any more, and it may have been this.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                interfaces = Interfaces::default();
                ask_for_interfaces(&socket).await?;
                burst.add(clock::monotonic());
            }
            Err(error) => return Err(error),
        }
    }
}

/// A socket that hears of links, addresses and routes. To read from and write to it is like any other of datagrams.
fn subscribe() -> io::Result<UnixDatagram> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    UnixDatagram::from_std(net::UnixDatagram::from(fd))
}

/// Has the links told that there are.
async fn ask_for_interfaces(socket: &UnixDatagram) -> io::Result<()> {
    let mut request = [0; HEADER + IFINFO];
    request[..4].copy_from_slice(&32_u32.to_ne_bytes());
    request[4..6].copy_from_slice(&RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    match socket.send(&request).await {
        // The answer to the last time still comes.
        Err(error) if error.raw_os_error() != Some(libc::EBUSY) => Err(error),
        _ => Ok(()),
    }
}

/// Makes one of many.
#[derive(Debug, Default)]
struct Burst {
    first: Option<Duration>,
    last: Duration,
    told: Option<Duration>,
}

impl Burst {
    fn add(&mut self, now: Duration) {
        self.first.get_or_insert(now);
        self.last = now;
    }

    /// When it is to be told, if there is anything to tell.
    fn due(&self) -> Option<Duration> {
        let settled = (self.last + SETTLE).min(self.first? + PACE);
        Some(self.told.map_or(settled, |told| settled.max(told + PACE)))
    }

    fn told(&mut self, now: Duration) {
        self.first = None;
        self.told = Some(now);
    }
}

/// The interfaces as far as they have been heard of, and the addresses on them that can be used beyond their link.
#[derive(Debug, Default)]
struct Interfaces {
    by_index: BTreeMap<u32, Interface>,
    /// Each with its interface.
    addresses: Vec<(u32, u128)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interface {
    part: Part,
    /// The bridge that it is a port of, or 0.
    master: u32,
    carries: bool,
}

/// What an interface is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Pods, services, this machine itself.
    Inside,
    /// What its ports are for.
    Bridge,
    /// Anything else may lead to the cloud.
    Outside,
}

impl Interfaces {
    /// Whether what the kernel sent says that the network may be back. What cannot be read says nothing.
    fn hear(&mut self, datagram: &[u8]) -> bool {
        let mut back = false;
        let mut rest = datagram;
        while let (Some(length), Some(kind), Some(flags)) = (u32_at(rest, 0), u16_at(rest, 4), u16_at(rest, 6)) {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let Some(body) = rest.get(HEADER..length) else { break };
            back |= self.message(kind, flags & NLM_F_MULTI != 0, body).unwrap_or(false);
            rest = rest.get(aligned(length)..).unwrap_or_default();
        }
        back
    }

    /// `listed` is what is told because it was asked for: it did not just happen. `None` if the message breaks off.
    fn message(&mut self, kind: u16, listed: bool, body: &[u8]) -> Option<bool> {
        match kind {
            RTM_NEWLINK => self.link(listed, body),
            RTM_DELLINK => {
                // A port that leaves its bridge is told as one, too, in the bridge's family.
                if *body.first()? == AF_UNSPEC {
                    self.by_index.remove(&u32_at(body, 4)?);
                }
                Some(false)
            }
            RTM_NEWADDR | RTM_DELADDR => self.address(kind == RTM_NEWADDR, body),
            RTM_NEWROUTE => {
                let (to, kind, flags) = (*body.get(1)?, *body.get(7)?, u32_at(body, 8)?);
                if kind != RTN_UNICAST || flags & RTM_F_CLONED != 0 {
                    return Some(false);
                }
                let (mut over_gateway, mut interface) = (false, None);
                for (kind, value) in attributes(body.get(RTMSG..)?) {
                    match kind {
                        RTA_OIF => interface = u32_at(value, 0),
                        RTA_GATEWAY | RTA_MULTIPATH | RTA_VIA | RTA_NH_ID => over_gateway = true,
                        _ => {}
                    }
                }
                // A pod's own default route is in its own network namespace, which is not this one.
                Some(to == 0 || over_gateway && interface.is_none_or(|index| self.leads_out(index)))
            }
            _ => Some(false),
        }
    }

    fn link(&mut self, listed: bool, body: &[u8]) -> Option<bool> {
        let (family, index, flags) = (*body.first()?, u32_at(body, 4)?, u32_at(body, 8)?);
        let (mut part, mut master) = (Part::Outside, 0);
        for (kind, value) in attributes(body.get(IFINFO..)?) {
            match kind {
                IFLA_MASTER => master = u32_at(value, 0)?,
                // A radio's message that says nothing of the rest.
                IFLA_WIRELESS => return Some(false),
                IFLA_LINKINFO => {
                    let kind = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                    part = part_of(kind.map(|(_, name)| name).unwrap_or_default());
                }
                _ => {}
            }
        }
        if family != AF_UNSPEC {
            return Some(false);
        }
        if flags & IFF_LOOPBACK != 0 {
            part = Part::Inside;
        }
        let carries = flags & IFF_UP != 0 && flags & IFF_RUNNING != 0;
        let new = Interface { part, master, carries };
        let old = self.by_index.get(&index).copied();
        if old.is_some() || self.by_index.len() < MAX_INTERFACES {
            self.by_index.insert(index, new);
        }
        // Of a bridge, its ports say it.
        Some(!listed && part == Part::Outside && carries && !old.is_some_and(|old| old.carries))
    }

    /// The kernel tells an address again whenever a router or a DHCP server prolongs it: only one that was not there is news.
    fn address(&mut self, is_there: bool, body: &[u8]) -> Option<bool> {
        let (flags, scope, index) = (*body.get(2)?, *body.get(3)?, u32_at(body, 4)?);
        if scope >= RT_SCOPE_LINK {
            return Some(false);
        }
        let mut own = None;
        for (kind, value) in attributes(body.get(IFADDR..)?) {
            // On a line to one peer the other one is the peer's.
            if kind == IFA_LOCAL || kind == IFA_ADDRESS && own.is_none() {
                own = Some(value.iter().take(16).fold(0, |number, byte| number << 8 | u128::from(*byte)));
            }
        }
        let own = (index, own?);
        let can_be_used = is_there && flags & (IFA_F_DADFAILED | IFA_F_DEPRECATED | IFA_F_TENTATIVE) == 0;
        match self.addresses.iter().position(|known| *known == own) {
            Some(at) if !can_be_used => drop(self.addresses.swap_remove(at)),
            Some(_) => return Some(false),
            None if can_be_used && self.addresses.len() < MAX_ADDRESSES => self.addresses.push(own),
            None => {}
        }
        Some(can_be_used && self.leads_out(index))
    }

    /// Whether the cloud may be behind this interface. What is not known may lead anywhere.
    fn leads_out(&self, index: u32) -> bool {
        self.by_index.get(&index).is_none_or(|interface| match interface.part {
            Part::Inside => false,
            Part::Outside => true,
            Part::Bridge => self.by_index.values().any(|port| port.master == index && port.part == Part::Outside),
        })
    }
}

fn part_of(kind: &[u8]) -> Part {
    match kind.strip_suffix(b"\0").unwrap_or(kind) {
        b"bridge" => Part::Bridge,
        // A pod's end of the line; addresses of services; what networks of pods are stretched over other machines with.
        b"veth" | b"dummy" | b"ifb" | b"vxlan" | b"geneve" => Part::Inside,
        _ => Part::Outside,
    }
}

/// Attributes until the first that breaks off.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

// Of linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h and if.h, which bind these numbers for ever.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400; // links; addresses and routes of IPv4, of IPv6
const HEADER: usize = 16;
const IFINFO: usize = 16;
const RTMSG: usize = 12;
const IFADDR: usize = 8;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_MULTI: u16 = 0x2;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLA_TYPE_MASK: u16 = 0x3fff;
const AF_UNSPEC: u8 = 0;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const IFF_RUNNING: u32 = 0x40;
const IFLA_MASTER: u16 = 10;
const IFLA_WIRELESS: u16 = 11;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_DADFAILED: u8 = 0x08;
const IFA_F_DEPRECATED: u8 = 0x20;
const IFA_F_TENTATIVE: u8 = 0x40;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTM_F_CLONED: u32 = 0x200;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_VIA: u16 = 18;
const RTA_NH_ID: u16 = 30;

#[cfg(test)]
mod tests;
