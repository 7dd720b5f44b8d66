//! What is wrong is said, with its cause and its remedy, and nothing is lost by it.

use std::fs;

use anyhow::{Result, ensure};
use skerry_tests::edge::Edge;
use skerry_tests::fault::FaultProxy;
use skerry_tests::manifests::sleeper;
use skerry_tests::peer;
use skerry_tests::ports;
use skerry_tests::wait::until;

use crate::world::{Setup, World, alone, control, refused, story};

#[test]
fn tokens_that_do_not_open() -> Result<()> {
    alone("bad-token", Setup { joined: false, ..Setup::default() }, |world| {
        let address = world.address().to_string();
        let good = world.cloud.new_token(&["--node", "another-name"])?.token;
        let other = |edge: &Edge, token: &str| edge.try_join(&address, token, &[]);
        refused(&other(&world.edge, "not-a-token")?, &["token", "cloudcore token create"])?;
        refused(&other(&world.edge, &good)?, &["another-name"])?;
        let last = good.chars().last().unwrap_or('a');
        let forged: String =
            good.chars().take(good.chars().count() - 1).chain([if last == '0' { '1' } else { '0' }]).collect();
        refused(&other(&world.edge, &forged)?, &["token"])?;

        let short = world.cloud.new_token(&["--ttl", "1s"])?.token;
        // Another machine asks: it may be let in as long as the token is good.
        until("the token to expire", 20, || {
            let answer = peer::join(world.cloud.address(), &short, "too-early", "machine-too-early")?;
            Ok(answer.is_err_and(|refusal| refusal.reason == "token_expired"))
        })?;
        refused(&other(&world.edge, &short)?, &["expired", "cloudcore token create"])?;

        let revoked = world.cloud.new_token(&[])?.token;
        let listed = world.cloud.token(&["list"])?;
        let id = listed
            .stdout
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .find(|id| id.len() > 3 && revoked.contains(id));
        ensure!(id.is_some(), "token list does not show it: {}", listed.text());
        let gone = world.cloud.token(&["revoke", id.unwrap_or_default()])?;
        ensure!(gone.success, "token revoke failed: {}", gone.text());
        refused(&other(&world.edge, &revoked)?, &["token", "cloudcore token create"])?;

        let once = world.cloud.new_token(&["--uses", "1"])?.token;
        let taken = peer::join(world.cloud.address(), &once, "first-one", "machine-first-one")?;
        ensure!(taken.is_ok(), "the first use failed: {taken:?}");
        refused(&other(&world.edge, &once)?, &["used", "cloudcore token create"])?;

        // None of it has put a half-made node there, and a good token still opens.
        ensure!(world.admin().find("node", world.edge.name())?.is_none(), "a refused join made a node");
        world.join()
    })
}

#[test]
fn clouds_that_are_not_ours_or_not_there() -> Result<()> {
    story("bad-cloud", |world| {
        let box_two = Edge::new(&world.dir().join("box-two"), "box-two", &world.runtime)?;
        let token = world.cloud.new_token(&[])?.token;
        let impostor = {
            let control = control()?;
            FaultProxy::start(&world.dir().join("impostor"), &control.server()?, &control.ca_pem()?)?
        };
        let impostor = impostor.front().0.trim_start_matches("https://").to_owned();
        refused(&box_two.try_join(&impostor, &token, &[])?, &["CA"])?;
        let closed = format!("127.0.0.1:{}", ports::free()?);
        let closed_words = [&closed, "refused the connection", "check that cloudcore runs"];
        refused(&box_two.try_join(&closed, &token, &[])?, &closed_words)?;
        let nowhere = "no-such-host.invalid";
        let words = [nowhere, "cannot be resolved", "check the spelling"];
        refused(&box_two.try_join(&format!("{nowhere}:10000"), &token, &[])?, &words)?;
        refused(&box_two.try_join("no port", &token, &[])?, &["HOST:PORT"])?;
        Ok(())
    })
}

#[test]
fn names_that_cannot_be_had() -> Result<()> {
    story("bad-name", |world| {
        let box_two = Edge::new(&world.dir().join("box-names"), "box-names", &world.runtime)?;
        let token = world.cloud.new_token(&[])?.token;
        let address = world.address().to_string();
        let long = "x".repeat(300);
        for name in ["Capital", "under_score", "-dash", "", long.as_str()] {
            let words = [name, "not a node name", "lower-case", "--node-name"];
            refused(&box_two.try_join(&address, &token, &[&format!("--node-name={name}")])?, &words)?;
        }
        // Another machine, as the box itself would know.
        fs::create_dir_all(box_two.data())?;
        fs::write(box_two.data().join("machine-id"), "another-machine")?;
        let taken = format!("--node-name={}", world.edge.name());
        let words = [world.edge.name(), "is another machine", "--node-name", "kubectl delete node"];
        refused(&box_two.try_join(&address, &token, &[&taken])?, &words)?;
        let answer = peer::join(world.cloud.address(), &token, world.edge.name(), "another-machine")?;
        ensure!(
            answer.is_err_and(|refusal| refusal.reason == "name_taken"),
            "the name of a living node was given away"
        );
        let answer = peer::join(world.cloud.address(), &token, "Not_A_Name", "another-machine")?;
        ensure!(answer.is_err_and(|refusal| refusal.reason == "name_invalid"), "an invalid name was let in");
        world.wait_connected()
    })
}

#[test]
fn a_box_that_is_not_fit_is_told_so() -> Result<()> {
    story("bad-box", |world| {
        let box_two = Edge::new(&world.dir().join("box-unfit"), "box-unfit", &world.runtime)?;
        let token = world.cloud.new_token(&[])?.token;
        let address = world.address().to_string();
        let nowhere = "unix:///run/no-such-runtime.sock";
        refused(
            &box_two.try_join(&address, &token, &["--runtime-endpoint", nowhere])?,
            &["/run/no-such-runtime.sock", "containerd"],
        )?;
        refused(&box_two.try_join(&address, &token, &["--no-such-flag"])?, &["--no-such-flag"])?;
        refused(&box_two.cli(&["no-such-command"])?, &["no-such-command"])?;
        refused(&box_two.cli(&["run"])?, &["join"])?;
        Ok(())
    })
}

#[test]
fn damaged_files_are_named() -> Result<()> {
    alone("bad-files", Setup::default(), |world| {
        world.run_pods(&sleeper("stays", world.edge.name(), true).to_string(), "app=sleeper", 1)?;
        world.edge.kill();
        let config = world.edge.data().join("config.toml");
        let good = fs::read_to_string(&config)?;

        fs::write(&config, format!("no_such_key = 1\n{good}"))?;
        start_is_refused(world, &["no_such_key", "config.toml"])?;
        fs::write(&config, "this is not TOML")?;
        start_is_refused(world, &["config.toml"])?;
        fs::write(&config, format!("node_name = 7\n{}", good.replace("node_name", "#")))?;
        start_is_refused(world, &["node_name"])?;
        fs::write(&config, &good)?;

        let certificates: Vec<_> = pem_files(world)?;
        ensure!(!certificates.is_empty(), "no certificate in {}", world.edge.data().display());
        // Pods do not need a certificate: with a damaged one they come back after a power cut, and the agent says what to do.
        let pods_dir = world.edge.pods();
        world.runtime.power_cycle(&[&pods_dir])?;
        ensure!(world.running()?.is_empty(), "containers outlived the power cut");
        let mut running = None;
        for path in certificates {
            let content = fs::read(&path)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            fs::write(&path, "-----BEGIN CERTIFICATE-----\ngarbage\n-----END CERTIFICATE-----\n")?;
            // What is wrong inside the CA is only found by using it.
            let named = if name == "ca.crt" { "CA cannot be used" } else { &name };
            without_a_certificate(world, &[named, "edgecore reset"])?;
            let now = world.running()?;
            ensure!(running.get_or_insert_with(|| now.clone()) == &now, "bad input stopped pods: {running:?} {now:?}");
            world.edge.kill();
            fs::write(&path, content)?;
        }
        let certificate = world.edge.data().join("identity/node.crt");
        let content = fs::read(&certificate)?;
        fs::remove_file(&certificate)?;
        without_a_certificate(world, &["no certificate", "edgecore reset"])?;
        world.edge.kill();
        fs::write(&certificate, content)?;
        let running = running.unwrap_or_default();
        ensure!(world.running()? == running, "bad input stopped pods");

        world.edge.start()?;
        world.wait_connected()?;
        ensure!(world.running()? == running, "pods were rebuilt: {running:?} {:?}", world.running());
        Ok(())
    })
}

/// The agent runs, with its pod, and says of the link what is wrong.
fn without_a_certificate(world: &mut World, words: &[&str]) -> Result<()> {
    world.edge.start()?;
    until("the pod to run without a certificate", 60, || Ok(world.running()?.len() == 1))?;
    until(&format!("edgecore to say {words:?}"), 30, || {
        let (said, log) = (world.edge.status()?, world.edge.log_text());
        Ok(words.iter().all(|word| said.contains(word) && log.contains(word)) && !said.contains("online for"))
    })
}

/// `edgecore run` ends by itself and says these words.
fn start_is_refused(world: &mut World, words: &[&str]) -> Result<()> {
    let output = world.edge.cli(&["run"])?;
    refused(&output, words)
}

/// The certificates and keys below the data directory.
fn pem_files(world: &World) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![world.edge.data()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| ["crt", "pem", "key"].iter().any(|known| extension == *known))
                && fs::read_to_string(&path).is_ok_and(|text| text.contains("-----BEGIN"))
            {
                found.push(path);
            }
        }
    }
    Ok(found)
}
