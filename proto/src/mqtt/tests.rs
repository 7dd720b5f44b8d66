use proptest::prelude::*;

use super::*;

const MAX_PAYLOAD: usize = 128 << 10;

fn all(decoder: &mut Decoder) -> Result<Vec<Packet>, Malformed> {
    let mut packets = Vec::new();
    while let Some(packet) = decoder.take()? {
        packets.push(packet);
    }
    Ok(packets)
}

/// What is read from bytes that come so many at a time, and the most that was kept meanwhile.
fn heard(bytes: &[u8], cut: usize) -> Result<(Vec<Packet>, usize), Malformed> {
    let mut decoder = Decoder::new(MAX_PAYLOAD);
    let (mut packets, mut most) = (Vec::new(), 0);
    for part in bytes.chunks(cut) {
        decoder.room().extend_from_slice(part);
        most = most.max(decoder.buffer.len());
        packets.append(&mut all(&mut decoder)?);
    }
    Ok((packets, most))
}

fn message(topic: &str, payload: Result<&[u8], usize>, qos: u8, id: u16) -> Packet {
    let payload = payload.map(Bytes::copy_from_slice);
    Packet::Publish { topic: topic.to_owned(), payload, qos, id, retain: false }
}

#[test]
fn what_is_written_is_as_in_the_standard() {
    let mut out = Vec::new();
    let hello = Connect { client_id: "c", user: Some("u"), password: Some("p"), keep_alive: 60, clean: true };
    connect(&mut out, &hello);
    assert_eq!(out, b"\x10\x13\0\x04MQTT\x04\xc2\0\x3c\0\x01c\0\x01u\0\x01p");
    out.clear();
    // A password without a user is not allowed.
    connect(&mut out, &Connect { user: None, keep_alive: 10, ..hello });
    assert_eq!(out, b"\x10\x0d\0\x04MQTT\x04\x02\0\x0a\0\x01c");
    out.clear();
    publish(&mut out, &Publish { topic: "a/b", payload: b"hi", qos: 1, retain: true }, 258);
    publish(&mut out, &Publish { topic: "t", payload: b"", qos: 0, retain: true }, 7);
    assert_eq!(out, b"\x33\x09\0\x03a/b\x01\x02hi\x31\x03\0\x01t");
    out.clear();
    subscribe(&mut out, 1, &[("a/b", 1), ("c", 2)]);
    unsubscribe(&mut out, 2, "a/b");
    assert_eq!(out, b"\x82\x0c\0\x01\0\x03a/b\x01\0\x01c\x02\xa2\x07\0\x02\0\x03a/b");
    out.clear();
    (0..3).for_each(|qos| acknowledge(&mut out, qos, 7));
    pubrel(&mut out, 8);
    pubcomp(&mut out, 9);
    ping(&mut out);
    disconnect(&mut out);
    assert_eq!(out, b"\x40\x02\0\x07\x50\x02\0\x07\x62\x02\0\x08\x70\x02\0\x09\xc0\0\xe0\0");
}

#[test]
fn what_a_broker_says_is_read() {
    let bytes = b"\x20\x02\0\0\x90\x05\0\x01\x01\x80\0\x40\x02\x01\x02\x50\x02\0\x03\x62\x02\0\x04\x70\x02\0\x05\xb0\x02\0\x06\xd0\0";
    let packets = [
        Packet::ConnAck { code: 0 },
        Packet::SubAck { refused: 1 },
        Packet::PubAck { id: 258 },
        Packet::PubRec { id: 3 },
        Packet::PubRel { id: 4 },
        Packet::PubComp { id: 5 },
        Packet::UnsubAck,
        Packet::PingResp,
    ];
    assert_eq!(heard(bytes, 1).unwrap().0, packets);
    // Sent again, and kept by the broker.
    let again = heard(b"\x3b\x06\0\x01t\0\x09x", 3).unwrap().0;
    assert_eq!(
        again,
        [Packet::Publish { topic: "t".into(), payload: Ok(Bytes::from("x")), qos: 1, id: 9, retain: true }]
    );
}

#[test]
fn what_no_broker_says_ends_it() {
    for bad in [
        &b"\x10\x02\0\0"[..],
        b"\x20\x01\0",
        b"\x20\x02\x02\0",
        b"\x21\x02\0\0",
        b"\x30\x01\0",
        b"\x30\x02\0\x05",
        b"\x30\x02\0\0",
        b"\x30\x03\0\x01\xff",
        b"\x30\x03\0\x01\0",
        b"\x30\x03\0\x01#",
        b"\x36\x05\0\x01t\0\x01",
        b"\x38\x03\0\x01t",
        b"\x32\x05\0\x01t\0\0",
        b"\x32\x04\0\x01t\0",
        b"\x40\x02\0\0",
        b"\x40\x03\0\x01\0",
        b"\x60\x02\0\x01",
        b"\x90\x02\0\x01",
        b"\x90\x03\0\x01\x03",
        b"\xb0\x01\0",
        b"\xd0\x01\0",
        b"\x30\xff\xff\xff\xff",
        b"\x40\xff\xff\xff\x7f",
    ] {
        assert!(heard(bad, 100).is_err(), "{bad:?}");
    }
}

#[test]
fn a_message_too_long_is_skipped_and_its_topic_known() {
    let long = vec![b'x'; 10 << 20];
    let mut out = Vec::new();
    for (payload, qos) in [(&long[..], 2), (&long[..], 0), (&long[..MAX_PAYLOAD], 1), (&long[..=MAX_PAYLOAD], 1)] {
        publish(&mut out, &Publish { topic: "a/b", payload, qos, retain: false }, 3);
    }
    let (packets, most) = heard(&out, 10_000).unwrap();
    assert!(most <= MAX_PAYLOAD + MAX_HEAD + 10_000, "{most}");
    let expected = [
        message("a/b", Err(10 << 20), 2, 3),
        message("a/b", Err(10 << 20), 0, 0),
        message("a/b", Ok(&long[..MAX_PAYLOAD]), 1, 3),
        message("a/b", Err(MAX_PAYLOAD + 1), 1, 3),
    ];
    assert_eq!(packets, expected);
}

#[test]
fn a_text_that_has_no_room_ends_at_a_character() {
    let topic = "é".repeat(40_000);
    let mut out = Vec::new();
    publish(&mut out, &Publish { topic: &topic, payload: b"x", qos: 0, retain: false }, 0);
    assert_eq!(heard(&out, 1 << 20).unwrap().0, [message(&topic[..65_534], Ok(b"x"), 0, 0)]);
}

proptest! {
    #[test]
    fn messages_survive_any_cut(
        messages in proptest::collection::vec(("[^\\x00+#]{1,20}", proptest::collection::vec(any::<u8>(), 0..300), 0..3_u8, 1..=u16::MAX), 1..8),
        cut in 1_usize..50,
    ) {
        let mut out = BytesMut::new();
        for (topic, payload, qos, id) in &messages {
            publish(&mut out, &Publish { topic, payload, qos: *qos, retain: false }, *id);
        }
        let said: Vec<_> = messages
            .iter()
            .map(|(topic, payload, qos, id)| message(topic, Ok(payload), *qos, if *qos > 0 { *id } else { 0 }))
            .collect();
        prop_assert_eq!(heard(&out, cut).unwrap().0, said);
    }

    #[test]
    fn any_bytes_are_answered_alike_however_they_come(bytes in proptest::collection::vec(any::<u8>(), 0..400), cut in 1_usize..50) {
        match (heard(&bytes, cut), heard(&bytes, 400)) {
            (Ok((one, _)), Ok((other, _))) => prop_assert_eq!(one, other),
            (one, other) => prop_assert_eq!(one.map(drop), other.map(drop)),
        }
    }
}
