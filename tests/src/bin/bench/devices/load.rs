//! A thousand devices of ten properties, each read once a second, over a narrow line; then faster and faster.

use skerry_tests::cloudcore::kubelet_address;
use skerry_tests::kubectl::kubelet_port;

use super::local::between;
use super::*;

const DEVICES: usize = 1000;
/// 256 kbit/s, in bytes.
const NARROW: u64 = 32_000;
/// How long everything is given to come to rest.
const REST: Duration = Duration::from_secs(10);
/// How long each rate is held.
const STEP: Duration = Duration::from_secs(15);
/// What reads faster: the name of its devices, and their cycle in milliseconds.
const FASTER: [(&str, u64); 4] = [("two", 500), ("four", 250), ("six", 166), ("eight", 125)];
/// What edgecore may come to hold more under the load, MB; what leaks is more, after ten minutes of ten thousand values a second.
const GROWTH: f64 = 2.0;
/// What may be written of devices in the apiserver: so many a second, and so many at once.
const WRITES: f64 = 5.0;
/// What a write in the apiserver may take to the device over the narrow line, in seconds, the median.
const NARROW_WRITE: f64 = 0.2;
/// For how long telemetry is asked for over the narrow line.
const STREAM: Duration = Duration::from_secs(30);

pub(super) fn measure(bed: &Bed, time: Duration) -> Result<()> {
    let base = at_rest(bed)?;
    let valve = writes::start(bed)?;
    let mapper = start(bed, "one", 1000)?;
    sleep(REST);
    let pids = [bed.edgecore()?, mapper.pid()];
    let cpu = || pids.iter().filter_map(|pid| procfs::cpu_seconds(*pid)).collect::<Vec<_>>();
    eprintln!("{} s of {} values a second, over 256 kbit/s", time.as_secs(), DEVICES * objects::PROPERTIES);
    bed.relay.set(|line| line.bandwidth = NARROW);
    bed.server.reset();
    let (begin, before, used, writes) = (Instant::now(), bed.local.samples("one-", DEVICES)?, cpu(), bed.writes()?);
    let mut desire = objects::Desire::new(&bed.kubeconfig)?;
    let mut undisturbed = Vec::new();
    let first = rss(pids[0])?;
    while begin.elapsed() < time {
        undisturbed.push(control(bed, &mut desire)?);
        sleep(Duration::from_secs(1));
    }
    let (after, counts, seconds) =
        (bed.local.samples("one-", DEVICES)?, bed.server.counts(), begin.elapsed().as_secs_f64());
    let used: Vec<f64> = cpu().iter().zip(used).map(|(after, before)| 100.0 * (after - before) / seconds).collect();
    let (read, lost) = between(&before, &after);
    let rate = float(read) / seconds;
    let last = rss(pids[0])?;
    eprintln!(
        "{read} values read, {} at the sink, {} twice; edgecore {:.1} %, mapper {:.1} % of a core; edgecore {first:.1} MB at first, {last:.1} MB at last",
        counts.values, counts.again, used[0], used[1]
    );
    tell("devices.lost", "edgecore", float(lost), "1");
    tell("devices.lost", "sink", float(counts.lost), "1");
    tell("devices.cpu.10k", "edgecore+mapper", used.iter().sum::<f64>() * 10_000.0 / rate, "%");
    let ours = float(undisturbed.len() as u64);
    let written = bed.writes()? - writes - ours;
    // The first may be at once.
    tell("devices.api.writes", "cloudcore", (written - WRITES).max(0.0) / seconds, "1/s");
    tell("devices.rss.1000", "edgecore", last - base, "MB");
    tell("devices.rss.growth", "edgecore", last - first, "MB");
    let narrow = stream(bed, &mut desire, undisturbed)?;
    bed.relay.set(|line| line.bandwidth = 0);
    drop((mapper, valve));
    let is_whole = lost + counts.lost == 0;
    sustained(bed, if is_whole { rate } else { 0.0 })?;
    ensure!(is_whole, "values were lost: {lost} on the way to edgecore, {} on the way to the sink", counts.lost);
    ensure!(written <= WRITES * seconds + WRITES, "{written} were written in the apiserver in {seconds:.0} s");
    ensure!(narrow <= NARROW_WRITE, "a write took {narrow:.3} s to the device over the narrow line");
    ensure!(last - first < GROWTH, "edgecore grew by {:.1} MB in {seconds:.0} s", last - first);
    Ok(())
}

/// Memory of an edgecore that has no devices yet.
fn at_rest(bed: &Bed) -> Result<f64> {
    eprintln!("{} s to settle", SETTLE.as_secs());
    sleep(SETTLE);
    rss(bed.edgecore()?)
}

/// Devices that count, and a mapper that reads them.
fn start(bed: &Bed, name: &str, cycle: u64) -> Result<Process> {
    eprintln!("{DEVICES} devices that are read every {cycle} ms");
    let port = bed.server.port();
    let property = |_| {
        let mut property = objects::read(name, cycle, &json!({"pattern": "counter"}));
        property["pushMethod"] = json!({"http": {"hostName": "127.0.0.1", "port": port, "requestPath": "/values"}});
        property
    };
    if bed.kubectl.find("device", &format!("{name}-0"))?.is_none() {
        bed.create("devicemodels", 1, |_| objects::model(name, "ReadOnly"))?;
        bed.create("devices", DEVICES, |number| {
            objects::device(&format!("{name}-{number}"), name, &json!({}), property)
        })?;
    }
    let mapper = bed.mapper("virtual", name)?;
    bed.reached(&format!("{name}-"), DEVICES)?;
    Ok(mapper)
}

/// From a write in the apiserver to the device.
fn control(bed: &Bed, desire: &mut objects::Desire) -> Result<f64> {
    let begin = Instant::now();
    let value = next().to_string();
    desire.write("valve-0", &writes::wanting(&value))?;
    Ok(bed.server.written(&value, Duration::from_secs(60))?.saturating_duration_since(begin).as_secs_f64())
}

/// A number that was not there before.
fn next() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(3000);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// All values are asked for from the cloud, of which the line carries a part: what is written to a device passes all the same. Answers the
/// longer of what that takes beside reports and beside values.
fn stream(bed: &Bed, desire: &mut objects::Desire, undisturbed: Vec<f64>) -> Result<f64> {
    eprintln!("all values are asked for over 256 kbit/s, for {} s", STREAM.as_secs());
    let up = bed.relay.bytes().0;
    // At the port of the node's kubelet: the apiserver's proxy goes to no loopback address.
    let node = bed.kubectl.get("node", NODE)?;
    let port = kubelet_port(&node).context("no port")?;
    let scraper = bed.control.authority()?.client(&bed.dir, "scraper", "admin", &["system:masters"])?;
    let mut command = Command::new("curl");
    command.args(["-sSfk", "-o", "/dev/null", "--cert"]).arg(&scraper.certificate).arg("--key").arg(&scraper.key);
    let mut reader = command.arg(format!("https://{}:{port}/devices/values", kubelet_address())).spawn()?;
    sleep(REST);
    let begin = Instant::now();
    let mut disturbed = Vec::new();
    while begin.elapsed() < STREAM {
        disturbed.push(control(bed, desire)?);
        sleep(Duration::from_secs(1));
    }
    let carried = float(bed.relay.bytes().0 - up) / (begin.elapsed() + REST).as_secs_f64();
    let is_read = reader.try_wait()?.is_none();
    reader.kill()?;
    reader.wait()?;
    ensure!(is_read, "the client ended that reads the values");
    ensure!(bed.cloud.metric("skerry_sessions")? == 1.0, "the session did not stand");
    eprintln!("{carried:.0} bytes a second went up");
    let mut longest = 0.0_f64;
    for (subject, times) in [("reports", undisturbed), ("values", disturbed)] {
        let count = times.len();
        let (median, worst) = median(times);
        eprintln!(
            "a write in the apiserver was at the device after {median:.3} s beside {subject}, at worst {worst:.3} s, of {count}"
        );
        tell("devices.desired.narrow.s", subject, median, "s");
        longest = longest.max(median);
    }
    Ok(longest)
}

/// The highest rate at which nothing is lost.
fn sustained(bed: &Bed, first: f64) -> Result<()> {
    let mut best = first;
    for (name, cycle) in FASTER {
        let mapper = start(bed, name, cycle)?;
        sleep(REST);
        bed.server.reset();
        let prefix = format!("{name}-");
        let (begin, before) = (Instant::now(), bed.local.samples(&prefix, DEVICES)?);
        let cpu = |pid| procfs::cpu_seconds(pid).unwrap_or_default();
        let pids = [bed.edgecore()?, mapper.pid()];
        let used = pids.map(cpu);
        sleep(STEP);
        let (after, seconds) = (bed.local.samples(&prefix, DEVICES)?, begin.elapsed().as_secs_f64());
        let (read, lost) = between(&before, &after);
        let [edgecore, of_mapper] = [0, 1].map(|at| 100.0 * (cpu(pids[at]) - used[at]) / seconds);
        let counts = bed.server.counts();
        let rate = float(read) / seconds;
        eprintln!(
            "{rate:.0} values a second: {lost} did not come to edgecore, {} not to the sink; edgecore {edgecore:.0} %, mapper {of_mapper:.0} % of a core",
            counts.lost
        );
        drop(mapper);
        if lost + counts.lost > 0 {
            break;
        }
        best = best.max(rate);
    }
    tell("devices.values.s", "edgecore", best, "1/s");
    Ok(())
}
