//! Encryption by default, which decides what new snapshots are like.

use super::probe::ask;
use crate::doctor::report::Findings;
use crate::store::ebs::clients::Clients;
use crate::store::ebs::ec2;

pub(super) async fn examine(clients: &Clients, report: &mut impl Findings) {
    const SUBJECT: &str = "encryption by default";
    let region = &clients.region;
    let by_default = match ask(clients.ec2.send(ec2::get_ebs_encryption_by_default())).await {
        Ok(answer) => answer.ebs_encryption_by_default,
        Err(failure) => {
            report.warn(
                SUBJECT,
                format!("it could not be told: {failure}"),
                "nothing, to read; allow ec2:GetEbsEncryptionByDefault to be told",
            );
            return;
        }
    };
    if !by_default {
        report.ok(
            SUBJECT,
            format!("off in {region}: a snapshot is encrypted where that is asked for"),
        );
        return;
    }
    let key = match ask(clients.ec2.send(ec2::get_ebs_default_kms_key_id())).await {
        Ok(answer) => answer.kms_key_id,
        Err(failure) => {
            report.warn(
                SUBJECT,
                format!("on in {region}, with a key that could not be told: {failure}"),
                "allow ec2:GetEbsDefaultKmsKeyId to be told; writing needs rights on this key",
            );
            return;
        }
    };
    report.ok(
        SUBJECT,
        format!("on in {region}: new snapshots are encrypted with {key}, and a parent that is not encrypted is refused; writing needs rights on this key, as docs/iam.md says"),
    );
}
