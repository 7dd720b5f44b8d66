//! Certificates over the years: of nodes, of the server, of the CA.
//!
//! Years do not pass here. What they leave does: the keys of this node and of the CA are in reach, so certificates are put in the place
//! of those that are there, for the same keys, with the dates that they would have.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use skerry_tests::aged::{Facts, NODE_LAG, NODE_LIFE, Signer, Validity, since};
use skerry_tests::cloudcore::NAMESPACE;
use skerry_tests::fault::Fault;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::peer;
use skerry_tests::wait::{eventually, patience, stays, until};
use time::{Duration as Span, OffsetDateTime};

use crate::world::{Setup, World, alone, story};

const TRANSPORTS: [&str; 2] = ["quic", "websocket"];
/// Where cloudcore keeps its CA.
const SECRET: &str = "skerry-ca";
/// For so long after its end a certificate can be renewed: twice its life.
const GRACE: Span = Span::days(730);
/// At this share of its life a certificate is renewed at the earliest.
const DUE: f64 = 0.54;
/// What is done while cloudcore waits for the time, which it does for ten seconds, leaves the rest for letting it have it.
const HELD: Duration = Duration::from_secs(5);

#[test]
fn a_node_renews_its_certificate_when_it_is_time_and_its_session_goes_on() -> Result<()> {
    story("certificates-renewal", |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        let before = world.running()?;
        let signer = Ca::read(world)?.signer()?;

        let young = begin_as(world, &signer, since(now() - NODE_LIFE * 0.3))?;
        world.wait_connected()?;
        stays("a certificate at 30 % of its life", Duration::from_secs(3), || Ok(Identity::of(world)? == young))?;
        let old = begin_as(world, &signer, since(now() - NODE_LIFE * 0.7))?;
        renewed(world, &old)?;
        world.wait_connected()?;

        let mut end = now();
        for transport in TRANSPORTS {
            world.edge.configure("transport", transport)?;
            let Midlife { identity: short, life, validity, session, connections } =
                connected_in_midlife(world, &signer)?;
            let fresh = renewed_within(world, &short, seconds(life))?;
            // In whole seconds, as dates are.
            let begun = Facts::of_pem(&short.certificate)?.validity.0;
            let share = (Facts::of_pem(&fresh.certificate)?.validity.0 + NODE_LAG - begun) / life;
            eprintln!("over {transport} it was renewed at {:.0} % of its life", share * 100.0);
            ensure!((DUE - 1.0 / 30.0..0.9).contains(&share), "it was renewed at {share} of its life");
            stays("the session", Duration::from_secs(1), || Ok(world.session()? == session))?;
            ensure!(world.relay.connections() == connections + 1, "more than the renewal went over the link");
            end = validity.1;
        }

        let (last, session) = (Identity::of(world)?, world.session()?);
        let left = seconds(end - now()) + 10;
        until("the certificate that the session began with to expire", left, || Ok(now() > end))?;
        stays("the session", Duration::from_secs(2), || Ok(world.session()? == session))?;
        world.restart_edge()?;
        world.wait_connected()?;
        ensure!(world.session()?.1 > session.1 && Identity::of(world)? == last, "the next start uses another one");
        ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
        Ok(())
    })
}

#[test]
fn a_box_that_was_off_for_twice_its_certificate_s_life_comes_back_unless_its_node_was_deleted() -> Result<()> {
    alone("certificates-expired", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&sleeper("one", &node, true).to_string(), "app=sleeper", 1)?;
        let before = world.running()?;
        let signer = Ca::read(world)?.signer()?;
        // The five minutes by which its beginning is dated back count twice.
        let just = || now() - NODE_LIFE - GRACE;
        let too_long = || just() - 2 * NODE_LAG - Span::minutes(1);

        for transport in TRANSPORTS {
            world.edge.configure("transport", transport)?;
            let expired = begin_as(world, &signer, since(too_long()))?;
            let words = ["expired at", "longer ago than twice", "`edgecore reset`", "join again"];
            refused(world, &words).with_context(|| format!("too long ago, over {transport}"))?;
            ensure!(Identity::of(world)?.certificate == expired.certificate, "it was renewed");

            let expired = begin_as(world, &signer, since(just()))?;
            renewed(world, &expired)?;
            world.wait_connected()?;
            ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
        }
        let renewals = world.cloud.log_text().matches("had_expired=true").count();
        ensure!(renewals == 2, "cloudcore tells of {renewals} renewals of what had expired");

        world.edge.stop();
        world.admin().delete("node", &node)?;
        world.admin().wait_gone("node", &node, 30)?;
        let expired = begin_as(world, &signer, since(just()))?;
        until("its pod to be wound down", 60, || Ok(world.running()?.is_empty()))?;
        refused(world, &["was deleted from the cluster", "`edgecore reset`", "join again"])?;
        ensure!(Identity::of(world)?.certificate == expired.certificate, "it was renewed");
        ensure!(world.admin().find("node", &node)?.is_none(), "the node came back");
        Ok(())
    })
}

#[test]
fn a_server_certificate_that_is_replaced_ends_nothing() -> Result<()> {
    alone("certificates-server", Setup { fault: true, ..Setup::default() }, |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&sleeper("one", &node, true).to_string(), "app=sleeper", 1)?;
        let before = world.running()?;
        let first = Ca::read(world)?;
        let second = announced(world, &first)?;
        // It is in memory, and good for longer than any test; but another takes its place, too, when another CA begins to sign, and when the
        // one before vouches for that no more.
        for transport in TRANSPORTS {
            let signer = Ca::read(world)?.signer()?;
            let old = begin_as(world, &signer, since(now() - NODE_LIFE * 0.7))?;
            renewed(world, &old)?;
            world.edge.configure("transport", transport)?;
            let mut exec = held_up(world, |world| match transport {
                "quic" => second.is_told_of_for_a_year(world),
                _ => has_signed_for_three_years(world),
            })?;
            let identity = Identity::of(world)?.peer();
            let shown = || peer::shown(world.cloud.address(), &identity);
            let (session, connections, shown_before) = (world.session()?, world.relay.connections(), shown()?);

            world.fault.as_ref().context("no proxy")?.release();
            until("whoever connects anew to be shown another one", 15, || {
                let shown_now = shown()?;
                Ok(shown_now.iter().zip(&shown_before).all(|(now, before)| now != before))
            })?;
            let chains = if transport == "quic" { (1, 2) } else { (2, 1) };
            for (was, is) in shown_before.iter().zip(&shown()?) {
                ensure!((was.len(), is.len()) == chains, "chains of {} and {} certificates", was.len(), is.len());
                let signed = Facts::of(&is[0])?;
                ensure!(signed.issuer == second.signer.name(), "it is signed by {}", signed.issuer);
            }
            exec.echoes("after").context("the command that ran meanwhile")?;
            stays("the session", Duration::from_secs(3), || {
                Ok(world.session()? == session && world.relay.connections() == connections)
            })?;
            exec.echoes("still")?;

            // Over QUIC an edge does not hear of a reset.
            if transport == "quic" {
                world.restart_edge()?;
            } else {
                world.relay.reset();
            }
            until("a newer session", 10, || Ok(world.session().is_ok_and(|newer| newer.1 > session.1)))?;
            ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
        }
        Ok(())
    })
}

#[test]
fn one_ca_follows_another_and_only_who_was_off_for_too_long_is_lost() -> Result<()> {
    alone("certificates-ca", Setup::default(), |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&sleeper("one", &node, true).to_string(), "app=sleeper", 1)?;
        let before = world.running()?;
        let first = Ca::read(world)?;
        let (old, off) = (first.signer()?, Identity::of(world)?);
        let token = world.cloud.new_token(&[])?.token;
        ensure!(off.authorities()? == [old.name()], "it trusts {:?}", off.authorities());

        // Half of its life is over: the next one is made, and whoever renews is told.
        let second = announced(world, &first)?;
        world.wait_connected()?;
        let held = begin_as(world, &old, since(now() - NODE_LIFE * 0.7))?;
        let told = renewed(world, &held)?;
        ensure!(told.authorities()? == [old.name(), second.signer.name()], "it trusts {:?}", told.authorities());
        ensure!(told.issuer()? == old.name(), "the next one signed");

        // A year later it signs.
        world.wait_connected()?;
        world.cloud.stop()?;
        second.is_told_of_for_a_year(world)?;
        world.cloud.boot()?;
        until("the next one to sign", 20, || Ok(Ca::read(world)?.signer()?.name() == second.signer.name()))?;
        world.wait_connected()?;
        ensure!(Identity::of(world)? == told, "what was good is renewed");
        let other = format!("--data-dir={}", world.dir().join("late").display());
        let joined = world.edge.try_join(&world.address().to_string(), &token, &[&other, "--node-name=late"])?;
        ensure!(joined.success, "a token from before is of no use: {}", joined.text());
        world.admin().delete("node", "late")?;
        for transport in TRANSPORTS {
            world.edge.configure("transport", transport)?;
            // Of a box that was off all the while, and has heard of nothing.
            world.edge.stop();
            off.put(world)?;
            let held = begin_as(world, &old, since(now() - NODE_LIFE - GRACE))?;
            let back = renewed(world, &held).with_context(|| format!("over {transport}"))?;
            world.wait_connected()?;
            ensure!(back.issuer()? == second.signer.name(), "the old one signed");
            ensure!(back.authorities()? == [second.signer.name(), old.name()], "it trusts {:?}", back.authorities());
        }
        ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());

        // What it signed cannot even be renewed any more: it goes.
        let held = Identity::of(world)?;
        world.cloud.stop()?;
        has_signed_for_three_years(world)?;
        world.cloud.boot()?;
        until("the old one to go", 20, || Ok(Ca::read(world)?.certificate.matches("BEGIN").count() == 1))?;
        world.wait_connected()?;
        let stranger = Signer::unknown()?;
        for transport in TRANSPORTS {
            world.edge.configure("transport", transport)?;
            world.edge.stop();
            off.put(world)?;
            world.edge.start()?;
            let words = ["is not signed by this cluster's CA", "`edgecore reset`", "join again"];
            refused(world, &words).with_context(|| format!("who knows the old one alone, over {transport}"))?;
            world.edge.stop();
            held.put(world)?;
            begin_as(world, &stranger, since(now()))?;
            let words = ["refused this node's certificate (UnknownCA)", "`edgecore reset`", "join again"];
            refused(world, &words).with_context(|| format!("whom another CA has signed, over {transport}"))?;
        }
        world.edge.stop();
        held.put(world)?;
        world.edge.start()?;
        world.wait_connected()?;
        ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
        Ok(())
    })
}

fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// What a box proves itself with, and whom it trusts: PEM, as its data directory has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    certificate: String,
    key: String,
    ca: String,
}

impl Identity {
    fn of(world: &World) -> Result<Self> {
        let read = |name| fs::read_to_string(file(world, name));
        Ok(Self { certificate: read("node.crt")?, key: read("node.key")?, ca: read("ca.crt")? })
    }

    fn put(&self, world: &World) -> Result<()> {
        for (name, content) in [("node.crt", &self.certificate), ("node.key", &self.key), ("ca.crt", &self.ca)] {
            fs::write(file(world, name), content)?;
        }
        Ok(())
    }

    fn issuer(&self) -> Result<String> {
        Ok(Facts::of_pem(&self.certificate)?.issuer)
    }

    /// The names of those that it trusts.
    fn authorities(&self) -> Result<Vec<String>> {
        let pems = self.ca.split_inclusive("-----END CERTIFICATE-----").filter(|pem| pem.contains("BEGIN"));
        pems.map(|pem| Ok(Facts::of_pem(pem)?.subject)).collect()
    }

    fn peer(self) -> peer::Identity {
        peer::Identity { certificate: self.certificate, key: self.key }
    }
}

fn file(world: &World, name: &str) -> PathBuf {
    world.edge.data().join("identity").join(name)
}

/// edgecore starts with another certificate for the key that it has.
fn begin_as(world: &mut World, signer: &Signer, validity: Validity) -> Result<Identity> {
    world.edge.stop();
    let held = Identity::of(world)?;
    let identity = Identity { certificate: signer.signed(&held.certificate, validity)?, ..held };
    identity.put(world)?;
    world.edge.start()?;
    Ok(identity)
}

/// A certificate that is renewed soon, and what stands before it is.
struct Midlife {
    identity: Identity,
    life: Span,
    validity: Validity,
    session: (String, u64),
    connections: u64,
}

/// edgecore is connected with a certificate of whose short life three tenths are over, and has not begun to renew it. Where it comes to that
/// too late, there is one that lives longer.
fn connected_in_midlife(world: &mut World, signer: &Signer) -> Result<Midlife> {
    for life in [30, 90, 270].map(Span::seconds) {
        let begun = now() - life * 0.3;
        let validity = (begun, begun + life);
        let identity = begin_as(world, signer, validity)?;
        world.wait_connected()?;
        let (session, connections) = (world.session()?, world.relay.connections());
        // Dates are in whole seconds, and so is what edgecore makes of them.
        let room = begun + life * DUE - Span::seconds(2) - now();
        eprintln!("connected {:.1} s before one of {} s is renewed", room.as_seconds_f64(), seconds(life));
        if room.is_positive() {
            ensure!(Identity::of(world)? == identity, "renewed before it was time");
            return Ok(Midlife { identity, life, validity, session, connections });
        }
    }
    bail!("this machine is too slow: edgecore was never connected before it had to renew its certificate")
}

fn seconds(span: Span) -> u64 {
    u64::try_from(span.whole_seconds()).unwrap_or_default()
}

/// Waits until edgecore has a new certificate in place of this one, which must be as the rules are.
fn renewed(world: &World, old: &Identity) -> Result<Identity> {
    renewed_within(world, old, 30)
}

fn renewed_within(world: &World, old: &Identity, seconds: u64) -> Result<Identity> {
    let new = eventually("the certificate to be renewed", seconds, || {
        // It is all there when its key has its name.
        let is_whole = !file(world, "node.key.new").exists();
        Ok(Some(Identity::of(world)?).filter(|new| is_whole && new.certificate != old.certificate))
    })?;
    let (was, is) = (Facts::of_pem(&old.certificate)?, Facts::of_pem(&new.certificate)?);
    ensure!(is.serial != was.serial && is.subject == was.subject, "{was:?} became {is:?}");
    ensure!(new.key != old.key && is.fits(&new.key)?, "its key is none, or the old one");
    let (from, to) = is.validity;
    ensure!(to - from == NODE_LIFE + NODE_LAG, "it is good for {}", to - from);
    ensure!((now() + NODE_LIFE - to).abs() < Span::minutes(2), "it is good until {to}");
    Ok(new)
}

/// Waits until edgecore, which has no session, says why, with the remedy, in its log and to whoever asks. What runs goes on, as it is not
/// looked at here.
fn refused(world: &World, words: &[&str]) -> Result<()> {
    let said = |text: &str| words.iter().all(|word| text.contains(word));
    until("edgecore to say why it is refused", 20, || {
        let status = world.edge.status()?;
        ensure!(!status.contains("online for"), "it is connected: {status}");
        ensure!(said(&status), "`edgecore status` does not say {words:?}: {status}");
        let log = world.edge.log_text();
        let (_, since) = log.rsplit_once("edgecore runs").context("it has not begun")?;
        ensure!(since.lines().any(said), "its log does not say {words:?}");
        Ok(true)
    })
}

/// What the Secret holds of the CA that signs, PEM.
struct Ca {
    certificate: String,
    key: String,
}

impl Ca {
    fn read(world: &World) -> Result<Self> {
        let secret = secret(world)?;
        let part = |name| part(&secret, name)?.with_context(|| format!("no {name}"));
        Ok(Self { certificate: part("tls.crt")?, key: part("tls.key")? })
    }

    fn signer(&self) -> Result<Signer> {
        Signer::new(&self.certificate, &self.key)
    }
}

/// One that does not sign yet.
struct Next {
    signer: Signer,
}

impl Next {
    /// It was made, and told of, so long ago that it begins to sign.
    fn is_told_of_for_a_year(&self, world: &World) -> Result<()> {
        let made = self.signer.made(now() - NODE_LIFE - Span::days(1))?;
        patch(world, &json!({"data": {"next.crt": STANDARD.encode(made)}}))
    }
}

/// The CA is one of years ago when cloudcore starts the next time, which then makes another.
fn announced(world: &mut World, ca: &Ca) -> Result<Next> {
    world.cloud.stop()?;
    let made = ca.signer()?.made(now() - Span::days(5 * 365 + 1))?;
    patch(world, &json!({"data": {"tls.crt": STANDARD.encode(made)}}))?;
    world.cloud.boot()?;
    let signer = eventually("the next CA to be made", 20, || {
        let secret = secret(world)?;
        let (Some(certificate), Some(key)) = (part(&secret, "next.crt")?, part(&secret, "next.key")?) else {
            return Ok(None);
        };
        Signer::new(&certificate, &key).map(Some)
    })?;
    Ok(Next { signer })
}

/// The CA took over so long ago that nothing of the one before can be of use.
fn has_signed_for_three_years(world: &World) -> Result<()> {
    let at = now() - NODE_LIFE - GRACE - Span::days(31);
    let since = at.replace_nanosecond(0)?.format(&time::format_description::well_known::Rfc3339)?;
    patch(world, &json!({"metadata": {"annotations": {"skerry.dev/ca-signs-since": since}}}))
}

fn secret(world: &World) -> Result<Value> {
    world.admin().in_namespace(NAMESPACE).get("secret", SECRET)
}

fn part(secret: &Value, name: &str) -> Result<Option<String>> {
    let Some(text) = secret["data"][name].as_str() else { return Ok(None) };
    Ok(Some(String::from_utf8(STANDARD.decode(text)?)?))
}

fn patch(world: &World, change: &Value) -> Result<()> {
    world.admin().in_namespace(NAMESPACE).patch("secret", SECRET, change)
}

/// cloudcore starts with a change of its CA that is due, and does not get to it, as long as it does not hear from the apiserver what time
/// it is, before edgecore is connected and a command runs in a pod.
fn held_up(world: &mut World, due: impl FnOnce(&World) -> Result<()>) -> Result<Exec> {
    world.edge.stop();
    world.cloud.stop()?;
    due(world)?;
    for _ in 0..3 {
        let fault = world.fault.as_ref().context("no proxy")?;
        fault.inject(|request| (request.path == "/version").then_some(Fault::Hold));
        let begin = Instant::now();
        world.cloud.boot()?;
        world.edge.start()?;
        world.wait_connected()?;
        let exec = Exec::begin(world)?;
        eprintln!("it waits for {:.1} s", begin.elapsed().as_secs_f64());
        // After ten it gives up, and asks again in an hour.
        if begin.elapsed() < HELD {
            return Ok(exec);
        }
        world.edge.stop();
        world.cloud.stop()?;
    }
    bail!("this machine is too slow: cloudcore never waited for the time until edgecore was connected")
}

/// A command in a pod that says what it is told.
struct Exec {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Exec {
    fn begin(world: &World) -> Result<Self> {
        let mut exec = eventually("a command to be run", 20, || {
            let mut kubectl = world.kubectl.command();
            kubectl.args(["exec", "-i", "one", "--", "cat"]);
            let mut child = kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
            let (input, output) = (child.stdin.take(), child.stdout.take());
            let (sender, lines) = mpsc::channel();
            let output = BufReader::new(output.context("no output")?);
            std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
            let mut exec = Self { child, input: input.context("no input")?, lines };
            Ok(exec.echoes("before").ok().map(|()| exec))
        })?;
        exec.echoes("begun")?;
        Ok(exec)
    }

    fn echoes(&mut self, word: &str) -> Result<()> {
        writeln!(self.input, "{word}")?;
        let said = self.lines.recv_timeout(patience(20)).context("it says nothing")?;
        ensure!(said == word, "it says {said:?}");
        Ok(())
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
