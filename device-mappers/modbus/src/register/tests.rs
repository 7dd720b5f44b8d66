use proptest::prelude::*;
use serde_json::json;

use super::*;

fn register(kind: Kind, visitor: serde_json::Value) -> Result<Register, ConfigError> {
    let device = Config::default();
    Register::new(&PropertyInfo { name: "p", kind, writable: true, device: &device }, &Config::from(visitor))
}

fn holding(kind: Kind, mut visitor: serde_json::Value) -> Register {
    visitor["register"] = "HoldingRegister".into();
    visitor["offset"] = 0.into();
    register(kind, visitor).unwrap()
}

#[test]
fn kubeedges_keys_mean_what_they_mean_there() {
    let register = register(
        Kind::Int,
        json!({"register": "CoilRegister", "offset": 2, "limit": 1, "scale": 1, "isSwap": true, "isRegisterSwap": true}),
    );
    let register = register.unwrap();
    assert_eq!((register.table, register.address, register.count), (Table::Coil, 2, 1));
    assert_eq!(register.decode(0, &[0b100]), Ok(Value::Int(1)));
    // Whole numbers are unsigned, and scaled.
    assert_eq!(
        holding(Kind::Int, json!({"limit": 1, "scale": 0.1})).decode(0, &[0x0f, 0xa0]),
        Ok(Value::Double(400.0))
    );
    assert_eq!(holding(Kind::Int, json!({"limit": 1})).decode(0, &[0xff, 0xff]), Ok(Value::Int(65_535)));
    assert_eq!(holding(Kind::Float, json!({"limit": 2})).decode(0, &1.5f32.to_be_bytes()), Ok(Value::Double(1.5)));
    assert_eq!(holding(Kind::Double, json!({"limit": 4})).decode(0, &1.5f64.to_be_bytes()), Ok(Value::Double(1.5)));
}

#[test]
fn bytes_and_registers_are_swapped() {
    let decode = |swap: bool, registers: bool| {
        holding(Kind::Int, json!({"limit": 2, "isSwap": swap, "isRegisterSwap": registers})).decode(0, &[1, 2, 3, 4])
    };
    assert_eq!(decode(false, false), Ok(Value::Int(0x0102_0304)));
    assert_eq!(decode(true, false), Ok(Value::Int(0x0201_0403)));
    assert_eq!(decode(false, true), Ok(Value::Int(0x0304_0102)));
    assert_eq!(decode(true, true), Ok(Value::Int(0x0403_0201)));
}

#[test]
fn sizes_and_signs_can_be_named() {
    assert_eq!(holding(Kind::Int, json!({"dataType": "int16"})).decode(0, &[0xff, 0xfe]), Ok(Value::Int(-2)));
    assert_eq!(holding(Kind::Int, json!({"dataType": "int32"})).decode(0, &[0xff; 4]), Ok(Value::Int(-1)));
    assert_eq!(
        holding(Kind::Double, json!({"dataType": "float32"})).decode(0, &2.5f32.to_be_bytes()),
        Ok(Value::Double(2.5))
    );
    assert!(holding(Kind::Int, json!({"dataType": "uint64"})).decode(0, &[0xff; 8]).is_err());
    assert_eq!(holding(Kind::String, json!({"limit": 3})).decode(0, b"abc\0\0\0"), Ok(Value::Text("abc".into())));
    assert_eq!(holding(Kind::Boolean, json!({"bit": 3})).decode(0, &[0, 8]), Ok(Value::Bool(true)));
}

#[test]
fn what_is_wrong_with_a_visitor_is_said() {
    for visitor in [
        json!({"offset": 1}),
        json!({"register": "Holding"}),
        json!({"register": "NoRegister", "offset": 1}),
        json!({"register": "HoldingRegister", "offset": 70_000}),
        json!({"register": "HoldingRegister", "offset": -1}),
        json!({"register": "HoldingRegister", "offset": 65_535, "limit": 2}),
        json!({"register": "HoldingRegister", "offset": 0, "limit": 3}),
        json!({"register": "HoldingRegister", "offset": 0, "limit": 126}),
        json!({"register": "HoldingRegister", "offset": 0, "scale": "fast"}),
    ] {
        assert!(register(Kind::Int, visitor.clone()).is_err(), "{visitor}");
    }
    assert!(register(Kind::String, json!({"register": "HoldingRegister", "offset": 0})).is_err());
}

#[test]
fn what_does_not_fit_is_not_written() {
    let int = holding(Kind::Int, json!({}));
    assert_eq!(int.encode(&Value::Int(65_535)), Ok(Written::Registers(vec![0xff, 0xff])));
    assert!(int.encode(&Value::Int(65_536)).is_err());
    assert!(int.encode(&Value::Int(-1)).is_err());
    let tenth = holding(Kind::Double, json!({"dataType": "int16", "scale": 0.1}));
    assert_eq!(tenth.encode(&Value::Double(-21.5)), Ok(Written::Registers((-215i16).to_be_bytes().to_vec())));
    assert!(tenth.encode(&Value::Double(4000.0)).is_err());
    assert!(holding(Kind::Float, json!({})).encode(&Value::Double(1e300)).is_err());
    assert!(holding(Kind::String, json!({"limit": 1})).encode(&Value::Text("abc".into())).is_err());
    let input = register(Kind::Int, json!({"register": "InputRegister", "offset": 0})).unwrap();
    assert!(input.encode(&Value::Int(1)).is_err());
}

fn at(table: &str, offset: u16, limit: u16) -> Register {
    register(Kind::Bytes, json!({"register": table, "offset": offset, "limit": limit})).unwrap()
}

#[test]
fn neighbours_are_read_together() {
    let (a, b, c, d, e) = (
        at("HoldingRegister", 10, 2),
        at("HoldingRegister", 0, 4),
        at("InputRegister", 4, 1),
        at("HoldingRegister", 4, 1),
        at("HoldingRegister", 300, 2),
    );
    let points = [&a, &b, &c, &d, &e];
    let spans = group(&points, 8, |_| false);
    let brief: Vec<(u16, u16, usize)> = spans.iter().map(|span| (span.start, span.count, span.members.len())).collect();
    assert_eq!(brief, [(0, 12, 3), (300, 2, 1), (4, 1, 1)]);
    assert_eq!(group(&points, 0, |_| false).len(), 4);
    assert_eq!(group(&points, 8, |point| point.address == 4).len(), 5);
}

proptest! {
    #[test]
    fn every_point_is_read_once_and_no_request_is_too_large(
        places in proptest::collection::vec((0..4usize, 0..1000u16, 1..20u16), 0..60),
        gap in 0..50u16,
    ) {
        let tables = ["CoilRegister", "DiscreteInputRegister", "HoldingRegister", "InputRegister"];
        let points: Vec<Register> = places.iter().map(|&(table, offset, limit)| at(tables[table], offset, limit)).collect();
        let points: Vec<&Register> = points.iter().collect();
        let spans = group(&points, gap, |point| point.address % 7 == 0);
        let mut seen: Vec<usize> = spans.iter().flat_map(|span| span.members.clone()).collect();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..points.len()).collect::<Vec<_>>());
        for span in &spans {
            prop_assert!(span.count <= span.table.most());
            for &member in &span.members {
                let point = points[member];
                prop_assert!(point.table == span.table && point.address >= span.start);
                prop_assert!(point.address + point.count <= span.start + span.count);
            }
        }
    }

    #[test]
    fn what_is_written_reads_the_same(number in -30_000..30_000i64, swap: bool, registers: bool, scale in 1..1000u16) {
        let scale = f64::from(scale) / 100.0;
        let visitor = json!({"dataType": "int32", "limit": 2, "isSwap": swap, "isRegisterSwap": registers, "scale": scale});
        let register = holding(Kind::Double, visitor);
        #[expect(clippy::cast_precision_loss, reason = "scaled numbers are measured ones")]
        let value = Value::Double(number as f64);
        let Ok(Written::Registers(bytes)) = register.encode(&value) else { panic!("not written") };
        let read = register.decode(0, &bytes).unwrap();
        prop_assert!(read.matches(&value, Kind::Double, register.tolerance()), "{read:?}");
    }

    #[test]
    fn no_bytes_break_it(bytes: Vec<u8>, start: u16) {
        for register in [at("HoldingRegister", 5, 3), at("CoilRegister", 5, 20), holding(Kind::Int, json!({"limit": 4}))] {
            let _ = register.decode(start, &bytes);
        }
    }
}
