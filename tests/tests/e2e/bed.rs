//! The bed itself, proven with the upstream kubelet: what fails here is the bed's fault, not ours.

use anyhow::{Result, ensure};
use skerry_tests::controlplane::ControlPlane;
use skerry_tests::kubectl::is_ready;
use skerry_tests::kubelet::Kubelet;
use skerry_tests::manifests::{list, sleeper};
use skerry_tests::paths::RunDir;
use skerry_tests::runtime::{Cni, Runtime};
use skerry_tests::wait::until;

use crate::world::{janitor, no_stage};

#[test]
fn the_upstream_kubelet_runs_pods_and_survives_a_power_cycle() -> Result<()> {
    if std::env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty()) {
        eprintln!("skipped: the upstream kubelet needs a certificate that the cluster of $KUBECONFIG does not give");
        return Ok(());
    }
    let _alone = no_stage();
    let run = RunDir::temporary(janitor())?;
    let control = ControlPlane::start(&run.path().join("control"))?;
    let mut runtime = Runtime::start(&run.path().join("runtime"), Cni::Ours)?;
    let mut kubelet = Kubelet::new(&control, &runtime, &run.path().join("kubelet"), "peer")?;
    kubelet.start()?;
    kubelet.wait_ready(&control)?;

    let kubectl = control.kubectl();
    kubectl.apply(&list(&[sleeper("with-token", "peer", true), sleeper("without", "peer", false)]))?;
    let ready = || Ok(kubectl.list("pods", "app=sleeper")?.iter().filter(|pod| is_ready(pod)).count() == 2);
    until("two pods to be ready", 60, ready)?;
    let token =
        runtime.cri().exec("with-token", "main", &["cat", "/var/run/secrets/kubernetes.io/serviceaccount/token"])?;
    ensure!(token.stdout.split('.').count() == 3, "no token in the pod: {}", token.text());
    let before = runtime.cri().running()?;

    kubelet.kill();
    runtime.power_off(&[&kubelet.root()])?;
    ensure!(skerry_tests::procfs::mounts_below(run.path()).is_empty(), "mounts outlived the power cut");
    runtime.boot()?;
    ensure!(runtime.cri().running()?.is_empty(), "containers outlived the power cut");

    kubelet.start()?;
    until("both pods to run again", 60, || Ok(runtime.cri().running()?.len() == 2))?;
    let after = runtime.cri().running()?;
    ensure!(
        before.iter().all(|container| !after.contains(container)),
        "a container outlived the power cut: {before:?} {after:?}"
    );
    until("two pods to be ready again", 60, ready)?;
    kubelet.stop();
    runtime.restart()?;
    ensure!(runtime.cri().running()? == after, "a restart of the runtime touched containers");
    Ok(())
}
