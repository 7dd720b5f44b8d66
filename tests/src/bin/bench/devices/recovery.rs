//! How long it takes, once what was away is back, until what is wanted reaches the device: a mapper and edgecore, which are killed, and the
//! device, whose way is closed; pymodbus's, which is killed and has forgotten all when it is back. And how long from the death of a broker until
//! the next one has its retained values.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skerry_tests::mapper::Modbus;

use super::*;

const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);
/// What each is to take at worst, in seconds.
const WORST: f64 = 5.0;
/// How long each is away; the broker for as long as edgecore takes to start another.
const AWAY: Duration = Duration::from_secs(3);

pub(super) fn measure(bed: &mut Bed) -> Result<()> {
    let way = Relay::start(([127, 0, 0, 1], bed.server.port()).into())?;
    let url = format!("http://{}", way.address());
    bed.create("devicemodels", 1, |_| objects::model("gate", "ReadWrite"))?;
    bed.create("devices", 1, |_| objects::device("gate-0", "gate", &json!({"url": url}), writes::property))?;
    let mut mapper = bed.mapper("http", "gate")?;
    bed.reached("gate-", 1)?;
    let mut values = (3000_u32..).map(|value| value.to_string());
    let mut next = || values.next().context("numbers do not end");

    let mut worst = vec![told("mapper", || {
        let value = next()?;
        mapper.signal(Signal::SIGKILL)?;
        bed.local.write("gate-0", "p0", &value)?;
        sleep(AWAY);
        let begin = Instant::now();
        mapper = bed.mapper("http", "gate")?;
        Ok(bed.server.written(&value, PATIENCE)? - begin)
    })?];
    worst.push(told("device", || {
        let value = next()?;
        way.close();
        bed.local.write("gate-0", "p0", &value)?;
        sleep(AWAY);
        let begin = Instant::now();
        way.open();
        Ok(bed.server.written(&value, PATIENCE)? - begin)
    })?);
    worst.push(told("edgecore", || {
        let value = next()?;
        bed.edge.kill();
        sleep(AWAY);
        let begin = Instant::now();
        bed.edge.start()?;
        // Nobody takes a write before it is there.
        until("a write to be taken", 60, || Ok(bed.local.write("gate-0", "p0", &value).is_ok()))?;
        Ok(bed.server.written(&value, PATIENCE)? - begin)
    })?);
    worst.push(modbus(bed)?);
    worst.push(broker(bed)?);
    mapper.stop(Duration::from_secs(5));
    ensure!(
        worst.iter().all(|worst| *worst <= WORST),
        "more than {WORST} s until something that came back was of use: {worst:?}"
    );
    Ok(())
}

/// What is wanted is in the register again.
fn modbus(bed: &Bed) -> Result<f64> {
    let mut plant = Modbus::start(&bed.dir.join("modbus"), false)?;
    let config = json!({"communicateMode": "TCP", "ip": "127.0.0.1", "port": plant.port(), "slaveID": 1});
    let property = |number: usize| {
        objects::read("plant", 1000, &json!({"register": "HoldingRegister", "offset": FIRST + number, "limit": 1}))
    };
    bed.create("devicemodels", 1, |_| objects::model("plant", "ReadWrite"))?;
    bed.create("devices", 1, |_| objects::device("plant-0", "plant", &config, property))?;
    let mapper = bed.mapper("modbus", "plant")?;
    bed.reached("plant-", 1)?;
    let mut values = 3000_u16..;
    let worst = told("pymodbus", || {
        let value = values.next().context("numbers do not end")?;
        plant.kill();
        bed.local.write("plant-0", "p0", &value.to_string())?;
        sleep(AWAY);
        plant.restart()?;
        let begin = Instant::now();
        while register(plant.port())? != value {
            ensure!(begin.elapsed() < PATIENCE, "{value} is not in the register");
            sleep(Duration::from_millis(10));
        }
        Ok(begin.elapsed())
    })?;
    mapper.stop(Duration::from_secs(5));
    Ok(worst)
}

/// The register of the first property.
const FIRST: usize = 100;

/// What is in it, read by unit 1: an interpreter for each look would take longer than what is measured.
fn register(port: u16) -> Result<u16> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.write_all(&[0, 1, 0, 0, 0, 6, 1, 3, 0, u8::try_from(FIRST)?, 0, 1])?;
    let mut answer = [0; 11];
    stream.read_exact(&mut answer)?;
    Ok(u16::from_be_bytes([answer[9], answer[10]]))
}

/// edgecore starts the broker itself, and starts another when it dies; retained values are there again then.
fn broker(bed: &mut Bed) -> Result<f64> {
    bed.edge.configure("mqtt_broker", "auto")?;
    bed.edge.stop();
    bed.edge.start()?;
    let retained = || {
        let mut command = Command::new(paths::tool("mosquitto_sub", "mosquitto-clients")?);
        command.args(["-C", "1", "-W", "1", "-t", "devices/default/gate-0/p0"]).stderr(Stdio::null());
        Ok(!command.output()?.stdout.is_empty())
    };
    until("the value at the broker", 60, retained)?;
    let edgecore = bed.edgecore()?;
    let worst = told("broker", || {
        let of = |entry: &procfs::Entry| entry.parent == edgecore && entry.program() == "mosquitto";
        let broker = procfs::processes().into_iter().find(of).context("there is no broker of edgecore's")?;
        let begin = Instant::now();
        kill(Pid::from_raw(broker.pid), Signal::SIGKILL)?;
        until("another broker with the value", 60, retained)?;
        Ok(begin.elapsed())
    })?;
    bed.edge.configure("mqtt_broker", "off")?;
    bed.edge.stop();
    bed.edge.start()?;
    Ok(worst)
}

/// Has something go away and come back, a few times: what is told is the worst of how long it took.
fn told(what: &str, mut returns: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let times: Vec<f64> = (0..ROUNDS).map(|_| Ok(returns()?.as_secs_f64())).collect::<Result<_>>()?;
    let (median, worst) = median(times);
    eprintln!("{what} back: median {median:.2} s, worst {worst:.2} s of {ROUNDS}");
    tell_precisely("devices.recovery.s", what, worst, "s", 2);
    Ok(worst)
}
