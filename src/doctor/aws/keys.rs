//! Encryption by default, which decides what new snapshots are like.

use super::outcome::ask;
use crate::doctor::report::Findings;
use crate::store::ebs::clients::Clients;

pub(super) async fn examine(clients: &Clients, report: &mut impl Findings) {
    const SUBJECT: &str = "encryption by default";
    let region = &clients.region;
    let by_default = match ask(clients.ec2.get_ebs_encryption_by_default().send()).await {
        Ok(answer) => answer.ebs_encryption_by_default == Some(true),
        Err(trouble) => {
            report.warn(
                SUBJECT,
                format!("it could not be told: {}", trouble.text()),
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
    let key = match ask(clients.ec2.get_ebs_default_kms_key_id().send()).await {
        Ok(answer) => answer.kms_key_id.unwrap_or_else(|| "a key of AWS".to_owned()),
        Err(trouble) => {
            report.warn(
                SUBJECT,
                format!("on in {region}, with a key that could not be told: {}", trouble.text()),
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
