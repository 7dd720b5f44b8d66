//! A connection to a server: a secure channel without security, a session in it, and the services that are asked for over it
//! (OPC 10000-4 and -6).

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use skerry_mapper::clock;
use skerry_mapper::net::{Address, Stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::status;
use crate::wire::{DataValue, Malformed, NodeId, Reader, Variant, Writer, ticks};

/// The longest message that is taken, bytes; a longer one is skipped.
pub const LONGEST: u32 = 512 << 10;
/// The longest chunk.
const CHUNK: u32 = 64 << 10;
/// A channel's life that is asked for, and how much of it passes before it is renewed.
const LIFE: Duration = Duration::from_secs(3600);
const NO_SECURITY: &str = "http://opcfoundation.org/UA/SecurityPolicy#None";
/// PublishRequests that wait at the server.
const PUBLISHING: usize = 2;
/// BadNoSubscription.
const NO_SUBSCRIPTION: u32 = 0x8079_0000;
/// By then PublishRequests from before a subscription was deleted are answered.
const SETTLED: Duration = Duration::from_secs(10);

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The connection, the channel or the session is gone.
    Gone(String),
    /// The server says no.
    Bad(u32),
    /// The answer was longer than [`LONGEST`].
    TooLong,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone(why) => f.write_str(why),
            Self::Bad(code) => f.write_str(&status::name(*code)),
            Self::TooLong => write!(f, "the answer has more than {LONGEST} bytes"),
        }
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Self::Gone(format!("the server's answer makes no sense: {}", malformed.0))
    }
}

type Result<T> = std::result::Result<T, Failure>;

/// Who asks.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// A user, and the password.
    pub user: Option<(String, String)>,
}

/// What is connected.
pub struct Client {
    stream: Box<dyn Stream>,
    url: String,
    patience: Duration,
    bytes: Vec<u8>,
    out: Vec<u8>,
    /// How much of `out` is sent.
    sent: usize,
    /// Requests whose answer is coming in pieces: what is there of it, or none when it is too long.
    partial: HashMap<u32, Option<Vec<u8>>>,
    channel: u32,
    token: u32,
    renew: Duration,
    sequence: u32,
    request: u32,
    session: NodeId,
    subscriptions: Vec<u32>,
    /// When that changed last.
    subscribed: Duration,
    /// PublishRequests that wait at the server.
    publishing: Vec<u32>,
    acknowledgements: Vec<(u32, u32)>,
    /// By the handle they were asked for with.
    changes: VecDeque<(u32, DataValue)>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Name and security of the policies for anonymous and for named users, as far as the server has them.
type Policies = [Option<(String, String)>; 2];

/// A message that is whole, to one request; none when it was too long.
type Message = (u32, Option<Vec<u8>>);

impl Client {
    /// Connects, opens a channel and a session, and says who asks.
    ///
    /// # Errors
    ///
    /// When one of these fails.
    pub async fn open(address: &Address, url: &str, identity: &Identity, patience: Duration) -> Result<Self> {
        let stream = address.connect().await.map_err(Failure::Gone)?;
        let mut client = Self {
            stream,
            url: url.to_owned(),
            patience,
            bytes: Vec::new(),
            out: Vec::new(),
            sent: 0,
            partial: HashMap::new(),
            channel: 0,
            token: 0,
            renew: Duration::MAX,
            sequence: 0,
            request: 0,
            session: NodeId::standard(0),
            subscriptions: Vec::new(),
            subscribed: Duration::ZERO,
            publishing: Vec::new(),
            acknowledgements: Vec::new(),
            changes: VecDeque::new(),
        };
        let opened = async {
            client.hello().await?;
            client.channel(0).await?;
            let policy = client.create_session().await?;
            client.activate_session(identity, &policy).await
        };
        match tokio::time::timeout(patience, opened).await {
            Ok(Ok(())) => Ok(client),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::Gone(format!("no answer within {patience:?}"))),
        }
    }

    async fn hello(&mut self) -> Result<()> {
        let mut body = Writer::default();
        body.u32(0).u32(CHUNK).u32(CHUNK).u32(LONGEST).u32(0).string(&self.url);
        self.send(*b"HEL", &body.0);
        self.flush().await?;
        let (kind, _, _) = self.chunk().await?;
        if &kind == b"ACK" { Ok(()) } else { Err(Failure::Gone("what answers does not speak OPC UA".to_owned())) }
    }

    /// Opens (0) or renews (1) the channel.
    async fn channel(&mut self, purpose: u32) -> Result<()> {
        let request = self.next_request();
        let mut body = Writer::default();
        body.u32(self.channel).string(NO_SECURITY).null().null();
        self.sequence(&mut body, request);
        self.header(&mut body, 446, request);
        body.u32(0).u32(purpose).u32(1).null().u32(u32::try_from(LIFE.as_millis()).unwrap_or(u32::MAX));
        self.send(*b"OPN", &body.0);
        let answer = self.answer(request).await?;
        let mut reader = response(&answer, 449)?;
        reader.u32()?;
        (self.channel, self.token) = (reader.u32()?, reader.u32()?);
        reader.i64()?;
        let life = Duration::from_millis(reader.u32()?.max(10_000).into()).min(LIFE);
        self.renew = clock::monotonic() + life.mul_f64(0.7);
        Ok(())
    }

    /// Creates a session; the server's policies for anonymous and for named users.
    async fn create_session(&mut self) -> Result<Policies> {
        let mut body = Writer::default();
        body.string("urn:skerry:mapper").string("urn:skerry").u8(2).string("Skerry").u32(1).null().null().count(0);
        body.null().string(&self.url.clone()).string("skerry-mapper");
        body.byte_string(&rand::random::<[u8; 32]>()).null().f64(60_000.0).u32(LONGEST);
        let answer = self.ask(461, &body.0).await?;
        let mut reader = response(&answer, 464)?;
        reader.node_id()?;
        self.session = reader.node_id()?;
        reader.f64()?;
        reader.byte_string()?;
        reader.byte_string()?;
        let mut policies = [None, None];
        for _ in 0..reader.count()? {
            reader.string()?;
            application(&mut reader)?;
            reader.byte_string()?;
            reader.u32()?;
            let unsecured = reader.string()? == NO_SECURITY;
            for _ in 0..reader.count()? {
                let (policy, kind) = (reader.string()?.to_owned(), reader.u32()?);
                reader.string()?;
                reader.string()?;
                let security = reader.string()?.to_owned();
                if let Some(place) = policies.get_mut(kind as usize).filter(|place| unsecured && place.is_none()) {
                    *place = Some((policy, security));
                }
            }
            reader.string()?;
            reader.u8()?;
        }
        Ok(policies)
    }

    async fn activate_session(&mut self, identity: &Identity, policies: &Policies) -> Result<()> {
        let refuse = |why: &str| Err(Failure::Gone(why.to_owned()));
        let mut token = Writer::default();
        let kind = match (&identity.user, policies) {
            (None, [anonymous, _]) => {
                token.string(anonymous.as_ref().map_or("anonymous", |(policy, _)| policy));
                321
            }
            (Some((user, password)), [_, Some((policy, security))]) => {
                if !security.is_empty() && security != NO_SECURITY {
                    return refuse("the server wants passwords encrypted, which is not supported");
                }
                token.string(policy).string(user).byte_string(password.as_bytes()).null();
                324
            }
            (Some(_), [_, None]) => return refuse("the server takes no user and password without security"),
        };
        let mut body = Writer::default();
        body.null().null().count(0).count(0).extension(kind, &token.0).null().null();
        let answer = self.ask(467, &body.0).await?;
        response(&answer, 470).map(drop)
    }

    /// Reads values.
    ///
    /// # Errors
    ///
    /// When there is no answer, or the server refuses all of it.
    pub async fn read(&mut self, nodes: &[&NodeId]) -> Result<Vec<DataValue>> {
        let mut body = Writer::default();
        body.f64(0.0).u32(2).count(nodes.len());
        for node in nodes {
            value_of(&mut body, node);
        }
        let answer = self.ask_in_time(631, &body.0).await?;
        let mut reader = response(&answer, 634)?;
        let count = reader.count()?;
        if count != nodes.len() {
            return Err(Malformed("it has not as many values as were asked for").into());
        }
        Ok((0..count).map(|_| reader.data_value()).collect::<std::result::Result<_, _>>()?)
    }

    /// Writes a value.
    ///
    /// # Errors
    ///
    /// When there is no answer, or the server refuses.
    pub async fn write(&mut self, node: &NodeId, value: &Variant) -> Result<()> {
        let mut body = Writer::default();
        body.count(1).node_id(node).u32(13).null().u8(1).variant(value);
        let answer = self.ask_in_time(673, &body.0).await?;
        let mut reader = response(&answer, 676)?;
        match (reader.count()?, reader.u32()?) {
            (1, code) if status::is_bad(code) => Err(Failure::Bad(code)),
            (1, _) => Ok(()),
            _ => Err(Malformed("it has not one result").into()),
        }
    }

    /// Calls a method; what it returns.
    ///
    /// # Errors
    ///
    /// When there is no answer, or the server refuses.
    pub async fn call(&mut self, object: &NodeId, method: &NodeId, inputs: &[Variant]) -> Result<Vec<Variant>> {
        let mut body = Writer::default();
        body.count(1).node_id(object).node_id(method).count(inputs.len());
        for input in inputs {
            body.variant(input);
        }
        let answer = self.ask_in_time(712, &body.0).await?;
        let mut reader = response(&answer, 715)?;
        if reader.count()? != 1 {
            return Err(Malformed("it has not one result").into());
        }
        let code = reader.u32()?;
        for _ in 0..reader.count()? {
            reader.u32()?;
        }
        reader.diagnostics()?;
        if status::is_bad(code) {
            return Err(Failure::Bad(code));
        }
        let count = reader.count()?;
        Ok((0..count).map(|_| reader.variant()).collect::<std::result::Result<_, _>>()?)
    }

    /// Asks to be told of changes; of each node, whether the server will.
    ///
    /// # Errors
    ///
    /// When there is no answer, or the server refuses all of it.
    pub async fn subscribe(&mut self, nodes: &[(u32, &NodeId)], interval: Duration) -> Result<Vec<u32>> {
        let milliseconds = interval.as_secs_f64() * 1000.0;
        let mut body = Writer::default();
        // Kept alive every ten intervals, given up after a thousand without a PublishRequest.
        body.f64(milliseconds).u32(1000).u32(10).u32(1000).u8(1).u8(0);
        let answer = self.ask_in_time(787, &body.0).await?;
        let subscription = response(&answer, 790)?.u32()?;
        let mut body = Writer::default();
        body.u32(subscription).u32(2).count(nodes.len());
        for (handle, node) in nodes {
            value_of(&mut body, node);
            body.u32(2).u32(*handle).f64(milliseconds).no_extension().u32(10).u8(1);
        }
        let answer = self.ask_in_time(751, &body.0).await?;
        let mut reader = response(&answer, 754)?;
        let mut codes = Vec::new();
        for _ in 0..reader.count()? {
            codes.push(reader.u32()?);
            reader.u32()?;
            reader.f64()?;
            reader.u32()?;
            reader.extension()?;
        }
        self.subscriptions.push(subscription);
        self.subscribed = clock::monotonic();
        Ok(codes)
    }

    /// Asks to be told no more.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub async fn unsubscribe(&mut self) -> Result<()> {
        if self.subscriptions.is_empty() {
            return Ok(());
        }
        let mut body = Writer::default();
        body.count(self.subscriptions.len());
        for subscription in self.subscriptions.drain(..) {
            body.u32(subscription);
        }
        self.acknowledgements.clear();
        self.changes.clear();
        let answer = self.ask_in_time(847, &body.0).await?;
        response(&answer, 850).map(drop)
    }

    /// Waits for changes, by handle. May be dropped before it ends.
    ///
    /// # Errors
    ///
    /// When the connection is gone.
    pub async fn changes(&mut self) -> Result<Vec<(u32, DataValue)>> {
        loop {
            while !self.subscriptions.is_empty() && self.publishing.len() < PUBLISHING {
                self.publish()?;
            }
            self.flush().await?;
            if !self.changes.is_empty() {
                break;
            }
            let (request, message) = self.message().await?;
            self.other(request, message)?;
        }
        Ok(self.changes.drain(..).collect())
    }

    fn publish(&mut self) -> Result<()> {
        let mut body = Writer::default();
        body.count(self.acknowledgements.len());
        for (subscription, number) in self.acknowledgements.drain(..) {
            body.u32(subscription).u32(number);
        }
        let request = self.request(826, &body.0)?;
        self.publishing.push(request);
        Ok(())
    }

    /// An answer that no one waits for: to a PublishRequest, or too late.
    fn other(&mut self, request: u32, message: Option<Vec<u8>>) -> Result<()> {
        let Some(place) = self.publishing.iter().position(|waiting| *waiting == request) else { return Ok(()) };
        self.publishing.remove(place);
        let Some(message) = message else { return Ok(()) };
        let mut reader = match response(&message, 829) {
            Ok(reader) => reader,
            // A subscription that the server has forgotten: all is made anew. Right after one was deleted, it is no news.
            Err(Failure::Bad(NO_SUBSCRIPTION)) if clock::monotonic() > self.subscribed + SETTLED => {
                return Err(Failure::Gone(status::name(NO_SUBSCRIPTION)));
            }
            Err(Failure::Bad(_)) => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let subscription = reader.u32()?;
        if !self.subscriptions.contains(&subscription) {
            return Ok(());
        }
        for _ in 0..reader.count()? {
            reader.u32()?;
        }
        reader.u8()?;
        let number = reader.u32()?;
        reader.i64()?;
        let notifications = reader.count()?;
        if notifications > 0 {
            self.acknowledgements.push((subscription, number));
        }
        for _ in 0..notifications {
            let (kind, body) = reader.extension()?;
            if kind != NodeId::standard(811) {
                continue;
            }
            let mut items = Reader::new(body);
            for _ in 0..items.count()? {
                self.changes.push_back((items.u32()?, items.data_value()?));
            }
        }
        Ok(())
    }

    async fn ask_in_time(&mut self, kind: u32, body: &[u8]) -> Result<Vec<u8>> {
        let patience = self.patience;
        let asked = async {
            if clock::monotonic() > self.renew {
                self.channel(1).await?;
            }
            self.ask(kind, body).await
        };
        match tokio::time::timeout(patience, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::Gone(format!("no answer within {patience:?}"))),
        }
    }

    async fn ask(&mut self, kind: u32, body: &[u8]) -> Result<Vec<u8>> {
        let request = self.request(kind, body)?;
        self.answer(request).await
    }

    /// Appends a request to what goes out.
    fn request(&mut self, kind: u32, body: &[u8]) -> Result<u32> {
        let request = self.next_request();
        let mut message = Writer::default();
        message.u32(self.channel).u32(self.token);
        self.sequence(&mut message, request);
        self.header(&mut message, kind, request);
        message.0.extend_from_slice(body);
        if message.0.len() > CHUNK as usize - 8 {
            return Err(Failure::TooLong);
        }
        self.send(*b"MSG", &message.0);
        Ok(request)
    }

    async fn answer(&mut self, request: u32) -> Result<Vec<u8>> {
        self.flush().await?;
        loop {
            match self.message().await? {
                (to, message) if to == request => return message.ok_or(Failure::TooLong),
                (other, message) => self.other(other, message)?,
            }
        }
    }

    fn next_request(&mut self) -> u32 {
        self.request = self.request.wrapping_add(1).max(1);
        self.request
    }

    fn sequence(&mut self, body: &mut Writer, request: u32) {
        self.sequence = self.sequence.wrapping_add(1);
        body.u32(self.sequence).u32(request);
    }

    fn header(&self, body: &mut Writer, kind: u32, request: u32) {
        body.node_id(&NodeId::standard(kind));
        body.node_id(&self.session).i64(ticks(clock::wall())).u32(request).u32(0).null();
        body.u32(u32::try_from(self.patience.as_millis()).unwrap_or(u32::MAX)).no_extension();
    }

    fn send(&mut self, kind: [u8; 3], body: &[u8]) {
        let mut chunk = Writer(std::mem::take(&mut self.out));
        chunk.0.extend_from_slice(&kind);
        chunk.u8(b'F').count(body.len() + 8).0.extend_from_slice(body);
        self.out = chunk.0;
    }

    /// Sends what was appended. May be dropped before it ends.
    async fn flush(&mut self) -> Result<()> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest).await {
                Ok(0) => return Err(Failure::Gone("the connection was closed".to_owned())),
                Ok(length) => self.sent += length,
                Err(error) => return Err(Failure::Gone(error.to_string())),
            }
        }
        self.out.clear();
        self.out.shrink_to(4096);
        self.sent = 0;
        self.stream.flush().await.map_err(|error| Failure::Gone(error.to_string()))
    }

    /// The next whole message. May be dropped before it ends.
    async fn message(&mut self) -> Result<Message> {
        loop {
            let (kind, last, body) = self.chunk().await?;
            let mut reader = Reader::new(&body);
            reader.u32()?;
            match &kind {
                b"OPN" => {
                    reader.string()?;
                    reader.byte_string()?;
                    reader.byte_string()?;
                }
                b"MSG" => {
                    reader.u32()?;
                }
                _ => return Err(Malformed("there is no such kind of message").into()),
            }
            reader.u32()?;
            let request = reader.u32()?;
            let rest = reader.rest();
            if self.partial.len() > 8 {
                return Err(Malformed("it sends too many answers at once").into());
            }
            let partial = self.partial.entry(request).or_insert_with(|| Some(Vec::new()));
            match partial {
                Some(bytes) if bytes.len() + rest.len() <= LONGEST as usize => bytes.extend_from_slice(rest),
                too_long => *too_long = None,
            }
            if last != b'C' {
                let message = self.partial.remove(&request).flatten();
                return Ok((request, message.filter(|_| last == b'F')));
            }
        }
    }

    /// The next chunk: its kind, whether it is the last, and what is after its head. May be dropped before it ends.
    async fn chunk(&mut self) -> Result<([u8; 3], u8, Vec<u8>)> {
        loop {
            if let Some(&[a, b, c, last, l1, l2, l3, l4]) = self.bytes.first_chunk::<8>() {
                let length = u32::from_le_bytes([l1, l2, l3, l4]) as usize;
                if !(8..=4 * CHUNK as usize).contains(&length) || !matches!(last, b'F' | b'C' | b'A') {
                    return Err(Failure::Gone("what answers does not speak OPC UA".to_owned()));
                }
                if self.bytes.len() >= length {
                    let body = self.bytes.get(8..length).unwrap_or_default().to_vec();
                    self.bytes.drain(..length);
                    self.bytes.shrink_to(8 << 10);
                    if [a, b, c] == *b"ERR" {
                        return Err(refusal(&body));
                    }
                    return Ok(([a, b, c], last, body));
                }
            }
            match self.stream.read_buf(&mut self.bytes).await {
                Ok(0) => return Err(Failure::Gone("the server closed the connection".to_owned())),
                Ok(_) => {}
                Err(error) => return Err(Failure::Gone(error.to_string())),
            }
        }
    }
}

fn refusal(body: &[u8]) -> Failure {
    let mut reader = Reader::new(body);
    let code = reader.u32().unwrap_or(0);
    Failure::Gone(format!("the server ends the connection: {}", status::name(code)))
}

/// What comes after the head of a response of this type.
fn response(message: &[u8], kind: u32) -> Result<Reader<'_>> {
    let mut reader = Reader::new(message);
    let is = reader.node_id()?;
    reader.i64()?;
    reader.u32()?;
    let code = reader.u32()?;
    reader.diagnostic()?;
    for _ in 0..reader.count()? {
        reader.string()?;
    }
    reader.extension()?;
    if status::is_gone(code) {
        return Err(Failure::Gone(status::name(code)));
    }
    if status::is_bad(code) {
        return Err(Failure::Bad(code));
    }
    if is != NodeId::standard(kind) {
        return Err(Malformed("it answers something else").into());
    }
    Ok(reader)
}

fn application(reader: &mut Reader<'_>) -> std::result::Result<(), Malformed> {
    reader.string()?;
    reader.string()?;
    reader.localized()?;
    reader.u32()?;
    reader.string()?;
    reader.string()?;
    for _ in 0..reader.count()? {
        reader.string()?;
    }
    Ok(())
}

/// A ReadValueId of a node's value.
fn value_of(body: &mut Writer, node: &NodeId) {
    body.node_id(node).u32(13).null().u16(0).null();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_answer_breaks_it(bytes: Vec<u8>, kind in 400..900u32) {
            if let Ok(mut reader) = response(&bytes, kind) {
                let _ = application(&mut reader);
            }
            let _ = refusal(&bytes);
        }
    }
}
