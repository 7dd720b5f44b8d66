//! What mappers send, as anybody could send it.

use proptest::prelude::*;
use prost::Message as _;
use skerry_proto::device::{DeviceModelSpec, DeviceSpec};
use skerry_proto::dmi::extensions::ReportRequest;
use skerry_proto::dmi::{ReportDeviceStatusRequest, Twin, TwinProperty};

use crate::devices::twin::{MapperInfo, Note, Now, Twins};

const NOW: Now = Now { mono: std::time::Duration::from_secs(1), wall: 1 };

fn twins() -> Twins {
    let mut twins = Twins::default();
    let model: DeviceModelSpec =
        serde_json::from_str(r#"{"properties":[{"name":"a","type":"INT"},{"name":"b"}]}"#).unwrap();
    let spec: DeviceSpec = serde_json::from_str(
        r#"{"deviceModelRef":{"name":"m"},"properties":[{"name":"a","reportToCloud":true},{"name":"b"}]}"#,
    )
    .unwrap();
    twins.model("n/m", "m", model);
    twins.device("n/d", "u", spec, NOW);
    twins.register(MapperInfo::default(), NOW);
    twins
}

fn value() -> impl Strategy<Value = Option<TwinProperty>> {
    let metadata = proptest::collection::hash_map("(timestamp|type|x)", "(-?[0-9]{0,25}|.{0,4})", 0..3);
    proptest::option::of(
        ("(-?[0-9]{0,22}|.{0,8})", metadata).prop_map(|(value, metadata)| TwinProperty { value, metadata }),
    )
}

proptest! {
    #[test]
    fn any_report_leaves_a_device_whose_status_can_be_told(
        said in proptest::collection::vec(("(a|b|c|)", value(), value()), 0..8),
        key in "(n/d|n/x|)",
        state in "(online|OK|.{0,6})",
    ) {
        let mut twins = twins();
        let said: Vec<Twin> = said
            .into_iter()
            .map(|(property_name, reported, observed_desired)| Twin { property_name, reported, observed_desired })
            .collect();
        let _ = twins.report_values(&key, &[], &said, NOW);
        let _ = twins.report_state(&key, &[7], &state, NOW);
        twins.tick(NOW);
        while let Some(due) = twins.take_report(NOW) {
            let text = serde_json::to_string(&due.report).unwrap();
            prop_assert_eq!(serde_json::from_str::<skerry_proto::device::DeviceReport>(&text).unwrap(), due.report);
        }
        let twin = twins.twin("n/d", NOW).unwrap();
        if let Some(reported) = &twin.properties[0].reported {
            prop_assert!(reported.value.parse::<i64>().is_ok());
        }
        let text = serde_json::to_string(&twin).unwrap();
        prop_assert_eq!(serde_json::from_str::<crate::devices::Twin>(&text).unwrap(), twin);
    }

    #[test]
    fn any_bytes_are_a_message_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(said) = ReportDeviceStatusRequest::decode(&bytes[..]) {
            let _ = twins().report_values("n/d", &[], &said.reported_device.unwrap_or_default().twins, NOW);
        }
        for said in ReportRequest::decode(&bytes[..]).map(|said| said.devices).unwrap_or_default() {
            let _ = twins().report_values("n/d", &[], &said.properties, NOW);
        }
        let _ = serde_json::from_slice::<Note>(&bytes);
    }
}
