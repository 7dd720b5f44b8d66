//! How long a desired value takes to the device: from the start of kubectl, and from a write at the box, to the request that the device
//! gets.

use super::*;

const ROUNDS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn measure(bed: &Bed) -> Result<()> {
    let _mapper = start(bed)?;
    let (mut local, mut desired) = (Vec::new(), Vec::new());
    eprintln!("{ROUNDS} writes at the box, {ROUNDS} with kubectl");
    for round in 0..ROUNDS {
        let value = (1000 + round).to_string();
        let begin = Instant::now();
        bed.local.write("valve-0", "p0", &value)?;
        local.push((bed.server.written(&value, PATIENCE)? - begin).as_secs_f64());
        sleep(Duration::from_millis(100));
    }
    for round in 0..ROUNDS {
        let value = (2000 + round).to_string();
        let begin = Instant::now();
        bed.kubectl.patch("device", "valve-0", &wanting(&value))?;
        desired.push((bed.server.written(&value, PATIENCE)?.saturating_duration_since(begin)).as_secs_f64());
        sleep(Duration::from_millis(300));
    }
    for (figure, times) in [("devices.local.s", local), ("devices.desired.s", desired)] {
        let (median, worst) = median(times);
        eprintln!("{figure}: worst {worst:.4} s of {ROUNDS}");
        tell_precisely(figure, "edgecore", median, "s", 4);
    }
    Ok(())
}

/// One device that is written to, and its mapper.
pub(super) fn start(bed: &Bed) -> Result<Process> {
    if bed.kubectl.find("device", "valve-0")?.is_none() {
        let url = format!("http://127.0.0.1:{}", bed.server.port());
        bed.create("devicemodels", 1, |_| objects::model("valve", "ReadWrite"))?;
        bed.create("devices", 1, |_| objects::device("valve-0", "valve", &json!({"url": url}), property))?;
    }
    let mapper = bed.mapper("http", "valve")?;
    bed.reached("valve-", 1)?;
    Ok(mapper)
}

pub(super) fn property(number: usize) -> serde_json::Value {
    let visitor = json!({"path": "/state", "jsonPointer": format!("/p{number}"), "writePath": "/limit"});
    json!({"collectCycle": 1000, "visitors": {"protocolName": "valve", "configData": visitor}})
}

/// A patch that has its first property be so.
pub(super) fn wanting(value: &str) -> serde_json::Value {
    let properties: Vec<_> = (0..objects::PROPERTIES)
        .map(|number| {
            let mut whole = property(number);
            whole["name"] = format!("p{number}").into();
            if number == 0 {
                whole["desired"] = json!({"value": value});
            }
            whole
        })
        .collect();
    json!({"spec": {"properties": properties}})
}
