//! What carries the link, and what it survives.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::network::Loss;
use skerry_tests::wait::until;

use crate::world::story;

#[test]
fn a_nat_that_gives_other_ports_ends_no_session() -> Result<()> {
    story("transport-rebinding", |world| {
        let node = world.edge.name().to_owned();
        world.carry_over("quic")?;
        let before = world.session()?;
        for round in 0..5 {
            world.relay.rebind();
            let name = format!("pod-{round}");
            world.run_pods(&sleeper(&name, &node, false).to_string(), "app=sleeper", round + 1)?;
        }
        // And one that starts anew and knows nobody.
        world.relay.close();
        std::thread::sleep(Duration::from_secs(2));
        world.relay.open();
        world.run_pods(&sleeper("pod-5", &node, false).to_string(), "app=sleeper", 6)?;
        let after = world.session()?;
        ensure!(before == after && after.0 == "QUIC", "another session: {before:?}, {after:?}");
        Ok(())
    })
}

#[test]
fn where_udp_is_blocked_the_link_is_a_websocket() -> Result<()> {
    story("transport-blocked", |world| {
        world.carry_over("auto")?;
        let (transport, _) = world.session()?;
        ensure!(transport == "QUIC", "UDP comes through, and the link is {transport}");
        // The network changes under a session on QUIC.
        world.relay.set(|line| line.no_udp = true);
        until("edgecore to notice", 40, || Ok(!world.is_connected()?))?;
        let noticed = Instant::now();
        world.wait_connected()?;
        // How long it waits for QUIC is up to a unit test: the clock here is also that of a slow machine.
        eprintln!("it was connected again {:.1} s after it had noticed", noticed.elapsed().as_secs_f64());
        let (transport, epoch) = world.session()?;
        ensure!(transport == "WebSocket", "UDP is blocked, and the link is {transport}");
        // What was learnt is used: no waiting for QUIC.
        let tried = world.relay.datagrams_tried();
        world.relay.reset();
        until("a newer session", 60, || Ok(world.session().is_ok_and(|(_, newer)| newer > epoch)))?;
        ensure!(world.relay.datagrams_tried() == tried, "it tried QUIC again at once");
        Ok(())
    })
}

/// Three of ten datagrams or segments, each way.
const LOSS: f64 = 0.3;

#[test]
fn a_bad_line_carries_work_over_either_transport() -> Result<()> {
    story("transport-bad-line", |world| {
        let node = world.edge.name().to_owned();
        for transport in ["quic", "websocket"] {
            world.carry_over(transport)?;
            // The relay loses datagrams; TCP's segments get lost on their way to it.
            world.relay.set(|line| (line.loss, line.latency) = (LOSS, Duration::from_millis(300)));
            let _lost = (transport == "websocket").then(|| Loss::of(world.relay.address().port(), LOSS)).transpose()?;
            let pods: Vec<_> = (0..3).map(|n| sleeper(&format!("{transport}-{n}"), &node, false)).collect();
            world.kubectl.apply(&list(&pods))?;
            until(&format!("three pods over {transport}"), 60, || Ok(world.running()?.len() == 3))?;
            world.wait_ready("app=sleeper", 3)?;
            for n in 0..3 {
                world.kubectl.delete("pod", &format!("{transport}-{n}"))?;
            }
            until("the three pods to go", 60, || Ok(world.running()?.is_empty()))?;
            world.relay.heal();
        }
        Ok(())
    })
}
