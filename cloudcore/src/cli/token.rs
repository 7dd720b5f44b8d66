//! `cloudcore token`: works on the cluster directly, no cloudcore has to run.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use skerry_proto::DEFAULT_PORT;
use skerry_proto::token::JoinToken;

use super::{Cluster, Create, Token};
use crate::app;
use crate::clock;
use crate::pki::{self, CertificateAuthority};
use crate::secrets::{KubeSecrets, SecretStore};
use crate::token::{JoinTokens, TokenInfo, TokenSpec};

/// Runs one of the token commands.
pub(super) async fn run(command: Token) -> anyhow::Result<()> {
    let (out, note) = match command {
        Token::Create(options) => {
            let store = store(&options.cluster).await?;
            create(store, options, clock::wall()).await?
        }
        Token::List(cluster) => list(store(&cluster).await?, clock::wall()).await?,
        Token::Revoke { id, cluster } => {
            let id = id.parse().map_or(id, |token: JoinToken| token.id);
            if !JoinToken::is_id(&id) {
                bail!("{id:?} is not a token's id: 6 characters of a-z and 0-9, as `cloudcore token list` shows them");
            }
            if !JoinTokens::new(store(&cluster).await?).revoke(&id).await? {
                bail!("there is no join token {id}; `cloudcore token list` shows those there are");
            }
            (String::new(), format!("the join token {id} is revoked"))
        }
    };
    std::io::stdout().write_all(out.as_bytes()).context("cannot write to standard output")?;
    if !note.is_empty() {
        writeln!(std::io::stderr(), "{note}").context("cannot write to standard error")?;
    }
    Ok(())
}

async fn store(cluster: &Cluster) -> anyhow::Result<Arc<KubeSecrets>> {
    let client = app::client(cluster.kubeconfig.as_deref()).await?;
    Ok(Arc::new(KubeSecrets::new(client, &cluster.namespace)))
}

/// What goes to standard output and what is said beside it.
async fn create(store: Arc<impl SecretStore>, options: Create, now: Timestamp) -> anyhow::Result<(String, String)> {
    let authority = CertificateAuthority::load(&*store).await?.with_context(|| {
        format!(
            "there is no CA in the namespace {} yet: start `cloudcore run` first, or name its namespace with --namespace",
            options.cluster.namespace
        )
    })?;
    let address = match &options.advertise_address {
        Some(address) => address.with_port(DEFAULT_PORT),
        None => pki::recorded_address(&*store).await?.context(
            "no cloudcore has recorded its address yet: start `cloudcore run` first, or give --advertise-address HOST:PORT",
        )?,
    };
    let spec = TokenSpec { ttl: options.ttl, uses: options.uses, node: options.node };
    let (token, info) = JoinTokens::new(store).create(&spec, authority.pin(now), now).await?;
    let name = info.node.as_ref().map(|node| format!(" --node-name {node}")).unwrap_or_default();
    let uses = info.uses.map_or_else(|| "any number of boxes".to_owned(), |uses| format!("{uses} boxes"));
    let note = format!(
        "run this on the box as root; good for {uses} until {}; revoke it with `cloudcore token revoke {}`",
        seconds(info.expires),
        info.id
    );
    Ok((format!("edgecore join {address} --token {token}{name}\n"), note))
}

async fn list(store: Arc<impl SecretStore>, now: Timestamp) -> anyhow::Result<(String, String)> {
    let (tokens, damaged) = JoinTokens::new(store).list().await?;
    let mut rows = vec![["ID", "EXPIRES", "USES LEFT", "NODE"].map(str::to_owned)];
    rows.extend(tokens.iter().map(|info| row(info, now)));
    rows.extend(damaged.into_iter().map(|id| [id, "damaged".to_owned(), "-".to_owned(), "-".to_owned()]));
    let widths: [usize; 4] = std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    let note = if rows.len() == 1 { "no join tokens; `cloudcore token create` makes one" } else { "" };
    Ok((out, note.to_owned()))
}

fn row(info: &TokenInfo, now: Timestamp) -> [String; 4] {
    let over = if info.expires <= now { " (over)" } else { "" };
    [
        info.id.clone(),
        format!("{}{over}", seconds(info.expires)),
        info.uses.map_or_else(|| "any".to_owned(), |uses| uses.to_string()),
        info.node.clone().unwrap_or_else(|| "any".to_owned()),
    ]
}

fn seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::secrets::fake::MemorySecrets;

    fn options() -> Create {
        let cluster = Cluster { kubeconfig: None, namespace: "skerry-system".to_owned() };
        Create {
            cluster,
            ttl: Duration::from_secs(3600),
            uses: Some(2),
            node: Some("box-1".to_owned()),
            advertise_address: None,
        }
    }

    #[tokio::test]
    async fn a_join_command_is_complete() {
        let store = Arc::new(MemorySecrets::default());
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let error = create(Arc::clone(&store), options(), now).await.unwrap_err().to_string();
        assert!(error.contains("no CA") && error.contains("cloudcore run"), "{error}");
        let authority = CertificateAuthority::load_or_create(&*store, None, now).await.unwrap();
        let error = create(Arc::clone(&store), options(), now).await.unwrap_err().to_string();
        assert!(error.contains("--advertise-address"), "{error}");

        pki::record_address(&*store, "cloud:10000").await.unwrap();
        let (out, note) = create(Arc::clone(&store), options(), now).await.unwrap();
        let words: Vec<&str> = out.split_whitespace().collect();
        let ["edgecore", "join", "cloud:10000", "--token", token, "--node-name", "box-1"] = words[..] else {
            panic!("{out}")
        };
        let token: JoinToken = token.parse().unwrap();
        assert_eq!(token.ca_hash, authority.pin(now));
        assert!(note.contains("2027-01-15T09:00:00Z"), "{note}");

        let (table, _) = list(Arc::clone(&store), now).await.unwrap();
        let expected = format!(
            "ID      EXPIRES               USES LEFT  NODE\n{}  2027-01-15T09:00:00Z  2          box-1\n",
            token.id
        );
        assert_eq!(table, expected);

        let elsewhere = Create { advertise_address: Some("[2001:db8::1]".parse().unwrap()), node: None, ..options() };
        let (out, _) = create(store, elsewhere, now).await.unwrap();
        assert!(
            out.starts_with("edgecore join [2001:db8::1]:10000 --token skerry.") && !out.contains("--node-name"),
            "{out}"
        );
    }
}
