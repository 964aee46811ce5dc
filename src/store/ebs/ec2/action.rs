//! The actions of EC2 that are used: the name, the parameters and the answer of each.
//!
//! All are in <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/>.

use std::fmt::Display;
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer};

use super::VERSION;
use crate::store::Filter;

/// A request that is answered with an `A`.
#[derive(Debug)]
pub(crate) struct Request<A> {
    action: &'static str,
    parameters: Vec<(String, String)>,
    answer: PhantomData<fn() -> A>,
}

impl<A> Request<A> {
    fn new(action: &'static str) -> Self {
        Self { action, parameters: Vec::new(), answer: PhantomData }
    }

    fn with(mut self, name: impl Into<String>, value: impl Display) -> Self {
        self.parameters.push((name.into(), value.to_string()));
        self
    }

    /// A list, whose members are counted from 1.
    fn with_list(self, name: &str, values: impl IntoIterator<Item: Display>) -> Self {
        let numbered = (1..).zip(values);
        numbered.fold(self, |request, (n, value)| request.with(format!("{name}.{n}"), value))
    }

    /// Only looks whether it would be allowed: the answer is the refusal `DryRunOperation`, or another.
    pub(crate) fn dry_run(self) -> Self {
        self.with("DryRun", true)
    }

    /// The action, and the body of the request.
    pub(super) fn into_form(self) -> (&'static str, String) {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("Action", self.action).append_pair("Version", VERSION);
        form.extend_pairs(self.parameters);
        (self.action, form.finish())
    }
}

/// The snapshots with this id. EC2 gives no pages for those that are named, others may.
pub(crate) fn describe_snapshot(id: &str) -> Request<Snapshots> {
    Request::new("DescribeSnapshots").with_list("SnapshotId", [id])
}

/// The snapshots of these owners that match all filters.
pub(crate) fn describe_snapshots(owners: &[String], filters: &[Filter]) -> Request<Snapshots> {
    let request = Request::new("DescribeSnapshots").with_list("Owner", owners);
    (1..).zip(filters).fold(request, |request, (n, Filter { name, values })| {
        request
            .with(format!("Filter.{n}.Name"), name)
            .with_list(&format!("Filter.{n}.Value"), values)
    })
}

impl Request<Snapshots> {
    /// So many on a page, from 5 to 1,000.
    pub(crate) fn max_results(self, max: u32) -> Self {
        self.with("MaxResults", max)
    }

    /// The page that another one has led to.
    pub(crate) fn page(self, token: Option<&str>) -> Self {
        token.into_iter().fold(self, |request, token| request.with("NextToken", token))
    }
}

pub(crate) fn delete_snapshot(id: &str) -> Request<Done> {
    Request::new("DeleteSnapshot").with("SnapshotId", id)
}

/// Adds tags, or replaces those of the same keys.
pub(crate) fn create_tags<'a>(
    id: &str,
    tags: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Request<Done> {
    let request = Request::new("CreateTags").with_list("ResourceId", [id]);
    (1..).zip(tags).fold(request, |request, (n, (key, value))| {
        request.with(format!("Tag.{n}.Key"), key).with(format!("Tag.{n}.Value"), value)
    })
}

/// Removes the tags with these keys, whatever their values. Without any key EC2 would remove all.
pub(crate) fn delete_tags<'a>(
    id: &str,
    keys: impl IntoIterator<Item = &'a String>,
) -> Request<Done> {
    let request = Request::new("DeleteTags").with_list("ResourceId", [id]);
    (1..).zip(keys).fold(request, |request, (n, key)| request.with(format!("Tag.{n}.Key"), key))
}

pub(crate) fn get_ebs_encryption_by_default() -> Request<EncryptionByDefault> {
    Request::new("GetEbsEncryptionByDefault")
}

pub(crate) fn get_ebs_default_kms_key_id() -> Request<DefaultKey> {
    Request::new("GetEbsDefaultKmsKeyId")
}

/// The answer of an action that has none but that it was done.
#[derive(Debug, Deserialize)]
pub(crate) struct Done {}

/// A page of snapshots.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Snapshots {
    #[serde(deserialize_with = "items", rename = "snapshotSet")]
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) next_token: Option<String>,
}

impl Snapshots {
    /// What leads to the next page. The last one may have none, or an empty one.
    pub(crate) fn next(&mut self) -> Option<String> {
        self.next_token.take().filter(|token| !token.is_empty())
    }
}

/// A snapshot. Each value is as it was sent: one that makes no sense is no reason to know nothing of the others.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(clippy::struct_field_names, reason = "they are those of EC2")]
pub(crate) struct Snapshot {
    pub(crate) snapshot_id: String,
    pub(crate) volume_id: Option<String>,
    /// `pending`, `completed`, `error`, …
    pub(crate) status: String,
    pub(crate) status_message: Option<String>,
    pub(crate) progress: Option<String>,
    pub(crate) start_time: Option<String>,
    pub(crate) completion_time: Option<String>,
    /// GiB
    pub(crate) volume_size: Option<String>,
    pub(crate) full_snapshot_size_in_bytes: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) encrypted: Option<String>,
    /// `archive`, or `standard`
    pub(crate) storage_tier: Option<String>,
    #[serde(deserialize_with = "items", rename = "tagSet")]
    pub(crate) tags: Vec<Tag>,
}

impl Snapshot {
    pub(crate) fn is_archived(&self) -> bool {
        self.storage_tier.as_deref() == Some("archive")
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Tag {
    pub(crate) key: String,
    pub(crate) value: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct EncryptionByDefault {
    pub(crate) ebs_encryption_by_default: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DefaultKey {
    pub(crate) kms_key_id: String,
}

/// Reads a list, whose members are elements named `item`.
fn items<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    struct Set<T> {
        #[serde(default = "Vec::new")]
        item: Vec<T>,
    }
    Set::deserialize(from).map(|set| set.item)
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    #[test]
    fn writes_lists_as_the_query_protocol_does() {
        let filters = ["tag:Name=a b,ü", "status=completed"].map(|text| text.parse().unwrap());
        let request = describe_snapshots(&["self".to_owned()], &filters);
        let (action, form) = request.max_results(1000).page(Some("a/+=")).into_form();
        assert_eq!(action, "DescribeSnapshots");
        assert_eq!(
            form,
            "Action=DescribeSnapshots&Version=2016-11-15&Owner.1=self&Filter.1.Name=tag%3AName\
             &Filter.1.Value.1=a+b&Filter.1.Value.2=%C3%BC&Filter.2.Name=status\
             &Filter.2.Value.1=completed&MaxResults=1000&NextToken=a%2F%2B%3D"
        );
        let tags = [("k".to_owned(), "v".to_owned()), ("l".to_owned(), String::new())];
        let tags = create_tags("snap-0", tags.iter().map(|(key, value)| (key, value)));
        let (_, form) = tags.dry_run().into_form();
        assert_eq!(
            form,
            "Action=CreateTags&Version=2016-11-15&ResourceId.1=snap-0&Tag.1.Key=k&Tag.1.Value=v\
             &Tag.2.Key=l&Tag.2.Value=&DryRun=true"
        );
    }

    #[test]
    fn reads_snapshots_whatever_is_in_them() {
        let text = "<?xml version=\"1.0\"?>
            <DescribeSnapshotsResponse xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\">
              <requestId>r</requestId>
              <nextToken>more</nextToken>
              <snapshotSet>
                <item>
                  <tagSet>
                    <item><key>Name</key><value> a &lt;b&gt; &amp; &#252;\n</value></item>
                    <item><value/><key>empty</key></item>
                    <item/>
                  </tagSet>
                  <snapshotId>snap-1</snapshotId><status>completed</status>
                  <volumeSize>8</volumeSize><completionTime/><description><![CDATA[<x>]]></description>
                  <newElement><item><deep/></item></newElement>
                </item>
                <item><snapshotId>snap-2</snapshotId><volumeSize>many</volumeSize><tagSet/></item>
              </snapshotSet>
            </DescribeSnapshotsResponse>";
        let mut page: Snapshots = parse("DescribeSnapshots", text.as_bytes()).unwrap();
        assert_eq!(page.next().as_deref(), Some("more"));
        let [one, two] = &page.snapshots[..] else { panic!("{page:?}") };
        let tag = |n: usize| (&*one.tags[n].key, one.tags[n].value.as_deref().unwrap_or(""));
        assert_eq!(tag(0), ("Name", " a <b> & ü\n"));
        assert_eq!(tag(1), ("empty", ""));
        assert_eq!((&*one.snapshot_id, one.description.as_deref()), ("snap-1", Some("<x>")));
        assert_eq!((&*two.snapshot_id, two.volume_size.as_deref()), ("snap-2", Some("many")));
    }
}
