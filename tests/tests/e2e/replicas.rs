//! Several cloudcores behind one address.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use skerry_tests::cloudcore::Cloudcore;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::relay::Relay;
use skerry_tests::wait::until;

use crate::world::{World, control, story};

#[test]
fn a_node_that_comes_to_another_replica_goes_on_and_leaves_the_first() -> Result<()> {
    story("replicas-takeover", |world| {
        let node = world.edge.name().to_owned();
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        let before = world.running()?;
        let second = {
            let control = control()?;
            Cloudcore::start(&control, &world.dir().join("second"), None)?
        };
        for transport in ["quic", "websocket"] {
            world.carry_over(transport)?;
            let (first_session, first) = (world.session()?.1, world.cloud.address());
            ensure!(
                sessions(&world.cloud)? == 1.0 && sessions(&second)? == 0.0,
                "the node is not at the first replica"
            );

            // The first replica hears nothing of the end of its session.
            world.relay.cut();
            world.edge.kill();
            world.relay.retarget(second.address());
            world.relay.heal();
            world.edge.start()?;
            world.wait_connected()?;
            until("the first replica to let go", 10, || Ok(sessions(&world.cloud)? == 0.0))?;
            ensure!(sessions(&second)? == 1.0, "the node is not at the second replica");
            ensure!(world.session()?.1 > first_session, "the epoch did not rise");
            ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
            is_operated(world)?;

            // What is done now is done once, and by the second.
            world.kubectl.apply(&sleeper("three", &node, false).to_string())?;
            world.wait_ready("app=sleeper", 3)?;
            world.kubectl.delete("pod", "three")?;
            world.kubectl.wait_gone("pod", "three", 60)?;
            std::thread::sleep(Duration::from_secs(12));
            world.wait_node_ready()?;
            ensure!(sessions(&second)? == 1.0 && sessions(&world.cloud)? == 0.0, "the session moved by itself");

            // And back.
            world.relay.cut();
            world.edge.kill();
            world.relay.retarget(first);
            world.relay.heal();
            world.edge.start()?;
            world.wait_connected()?;
            until("the second replica to let go", 10, || Ok(sessions(&second)? == 0.0))?;
            ensure!(world.running()? == before, "containers changed: {before:?} {:?}", world.running());
            is_operated(world)?;
        }
        Ok(())
    })
}

#[test]
fn sessions_move_between_replicas_while_pods_come_and_go() -> Result<()> {
    story("replicas-moving", |world| {
        let node = world.edge.name().to_owned();
        let second = {
            let control = control()?;
            Cloudcore::start(&control, &world.dir().join("moving"), None)?
        };
        let both = [world.cloud.address(), second.address()];
        world.carry_over("websocket")?;
        for round in 0..8 {
            world.kubectl.apply(&sleeper(&format!("pod-{round}"), &node, false).to_string())?;
            if round >= 2 {
                world.kubectl.delete("pod", &format!("pod-{}", round - 2))?;
            }
            world.relay.retarget(both[(round + 1) % 2]);
            world.relay.reset();
            std::thread::sleep(Duration::from_millis(300));
        }
        for gone in 0..6 {
            world.kubectl.wait_gone("pod", &format!("pod-{gone}"), 60)?;
        }
        world.wait_ready("app=sleeper", 2)?;
        until("exactly the two pods to run", 30, || Ok(world.running()?.len() == 2))?;
        world.relay.retarget(both[0]);
        world.relay.reset();
        until("the session to be where it was", 30, || {
            Ok(sessions(&world.cloud)? == 1.0 && sessions(&second)? == 0.0 && world.is_connected()?)
        })
    })
}

#[test]
fn a_replica_that_lags_takes_nothing_back() -> Result<()> {
    story("replicas-lagging", |world| {
        let node = world.edge.name().to_owned();
        // The second hears of everything late.
        let (lag, second) = {
            let control = control()?;
            let server = control.server()?;
            let address: SocketAddr = server.trim_start_matches("https://").parse()?;
            let lag = Relay::start(address)?;
            let front = format!("https://{}", lag.address());
            let second = Cloudcore::start(&control, &world.dir().join("lagging"), Some((&front, &control.ca_pem()?)))?;
            (lag, second)
        };
        world.run_pods(&list(&[sleeper("one", &node, true), sleeper("two", &node, false)]), "app=sleeper", 2)?;
        world.carry_over("websocket")?;
        lag.set(|line| line.latency = Duration::from_millis(1500));
        // One is made and one is ended that the second will not have heard of.
        world.kubectl.apply(&sleeper("three", &node, false).to_string())?;
        world.wait_ready("app=sleeper", 3)?;
        world.kubectl.delete("pod", "two")?;
        world.kubectl.wait_gone("pod", "two", 60)?;
        std::thread::sleep(Duration::from_millis(300));
        let before = world.running()?;
        world.relay.retarget(second.address());
        world.relay.reset();
        let (mut stands_since, end) = (None, Instant::now() + Duration::from_secs(60));
        while stands_since.is_none_or(|since: Instant| since.elapsed() < Duration::from_secs(10)) {
            ensure!(Instant::now() < end, "the node is not at the second replica");
            let now = world.running()?;
            ensure!(now == before, "the second took something back: {before:?} {now:?}");
            if stands_since.is_none() && sessions(&second)? == 1.0 {
                stands_since = Some(Instant::now());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        // It goes on from there.
        lag.set(|line| line.latency = Duration::ZERO);
        world.kubectl.delete("pod", "three")?;
        world.kubectl.wait_gone("pod", "three", 60)?;
        world.relay.retarget(world.cloud.address());
        world.relay.reset();
        until("the session to be where it was", 30, || Ok(sessions(&world.cloud)? == 1.0 && world.is_connected()?))
    })
}

/// kubectl gets at the node's pods, wherever its session is: the Node tells the port of the replica that has it.
fn is_operated(world: &World) -> Result<()> {
    until("kubectl to get at a pod again", 20, || {
        let said = world.kubectl.output(&["exec", "one", "--", "echo", "here"])?;
        Ok(said.success && said.stdout == "here\n")
    })
}

/// Sessions that stand at a cloudcore, by its own account.
pub(crate) fn sessions(cloud: &Cloudcore) -> Result<f64> {
    cloud.metric("skerry_sessions")
}
