//! Batches as PUBLISH packets. A batch is confirmed when the broker has acknowledged all of it: QoS 1 and 2 by their own packets, QoS 0 by
//! a PINGREQ behind them, which the broker answers after what came before.

use super::format::PUBLISH_HEAD;
use super::queue::Batch;
use super::writer::PushError;
use crate::net::Address;
use crate::net::mqtt::{Connect, Connection, Publish};

pub(crate) struct Mqtt {
    address: String,
    connection: Option<Connection>,
}

impl Mqtt {
    pub(crate) fn new(address: &str) -> Self {
        Self { address: address.to_owned(), connection: None }
    }

    pub(crate) async fn push(&mut self, batch: &Batch) -> Result<(), PushError> {
        // The broker may have closed a connection that was idle: that is found out by using it, and is no failure.
        if let Some(mut connection) = self.connection.take()
            && publish(&mut connection, batch).await.is_ok()
        {
            self.connection = Some(connection);
            return Ok(());
        }
        let mut connection = self.connect().await.map_err(PushError::Away)?;
        publish(&mut connection, batch).await.map_err(PushError::Away)?;
        self.connection = Some(connection);
        Ok(())
    }

    async fn connect(&self) -> Result<Connection, String> {
        let address = Address::parse(&self.address, 1883)?;
        let client_id = format!("skerry-{:016x}", rand::random::<u64>());
        // Clean and without keep-alive: what is not confirmed is published again, and whether the broker is there is asked by publishing.
        let connect = Connect {
            client_id: &client_id,
            user: address.user.as_deref(),
            password: address.password.as_deref(),
            keep_alive: 0,
            clean: true,
        };
        Connection::open(&address, &connect).await
    }
}

async fn publish(connection: &mut Connection, batch: &Batch) -> Result<(), String> {
    let mut ping = false;
    for record in batch.iter() {
        let Some((&[flags, high, low], rest)) = record.split_first_chunk::<PUBLISH_HEAD>() else { continue };
        let Some((topic, payload)) = rest.split_at_checked(usize::from(u16::from_be_bytes([high, low]))) else {
            continue;
        };
        let Ok(topic) = std::str::from_utf8(topic) else { continue };
        let qos = flags & 3;
        ping |= qos == 0;
        connection.queue_publish(&Publish { topic, payload, qos, retain: flags & 4 != 0 });
    }
    connection.confirm(ping).await
}
