//! How new the objects of each collection may be, by the apiserver's revisions, as one value of the store's.

use skerry_proto::sync::Collection;

/// Of each collection that anything was said of.
pub type Revisions = Vec<(Collection, u64)>;

pub(super) fn text(revisions: &Revisions) -> String {
    let each: Vec<String> =
        revisions.iter().map(|(collection, newest)| format!("{}:{newest}", i32::from(*collection))).collect();
    each.join(",")
}

/// What is not to be read, such as a collection that only a newer version knows, is left out: the cloud is then compared with less.
pub(super) fn parse(text: &str) -> Revisions {
    let one = |part: &str| {
        let (collection, newest) = part.split_once(':')?;
        let collection = Collection::try_from(collection.parse::<i32>().ok()?).ok()?;
        Some((collection, newest.parse().ok()?))
    };
    text.split(',').filter_map(one).collect()
}
