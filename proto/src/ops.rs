//! What streams of the class [`ops`](crate::mux::Class::Ops) are for, told by their header.

/// Header of a stream, opened by the cloud, on which the edge is a kubelet's HTTP server.
///
/// The stream carries HTTP/1.1 without TLS, the cloud is the client, and there is one request on a stream: its path and query are a
/// kubelet's (`/containerLogs/…`, `/exec/…`, `/stats/summary`). Whoever asks has been authenticated and authorised, and no credentials
/// come along. After a `101` the stream is what the two ends have upgraded it to. Each writing half is shut down by whoever writes.
pub const KUBELET: &[u8] = b"kubelet";
