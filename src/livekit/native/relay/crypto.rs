//! The cryptography of TURN for `rtc-turn`, on the provider that the rest of the canary uses: MD5 for the key of a
//! long-term credential, and HMAC-SHA1 for the integrity of a message (RFC 8489, sections 9.2.2 and 14.5).

use aws_lc_rs::{constant_time, hmac, rand};
use md5::{Digest, Md5};
use rtc_turn::crypto::{
    CryptoAlgorithm, CryptoError, HashAlgorithm, HmacAlgorithm, Mac, RTCCrypto, RTCCryptoProvider,
    RTCRandom,
};

pub(super) struct TurnCrypto;

impl RTCCryptoProvider for TurnCrypto {
    fn name(&self) -> &'static str {
        "aws-lc-rs"
    }

    fn crypto(&self) -> &dyn RTCCrypto {
        self
    }

    fn random(&self) -> &dyn RTCRandom {
        self
    }
}

impl RTCRandom for TurnCrypto {
    fn fill(&self, output: &mut [u8]) -> Result<(), CryptoError> {
        rand::fill(output).map_err(|_| CryptoError::RandomnessFailed)
    }
}

impl RTCCrypto for TurnCrypto {
    fn supports(&self, algorithm: CryptoAlgorithm) -> bool {
        matches!(
            algorithm,
            CryptoAlgorithm::Hash(HashAlgorithm::Md5) | CryptoAlgorithm::Hmac(HmacAlgorithm::Sha1)
        )
    }

    fn hash(&self, algorithm: HashAlgorithm, data: &[u8]) -> Result<Vec<u8>, CryptoError> {
        match algorithm {
            HashAlgorithm::Md5 => Ok(Md5::digest(data).to_vec()),
            other => Err(CryptoError::UnsupportedAlgorithm(CryptoAlgorithm::Hash(
                other,
            ))),
        }
    }

    fn new_hmac(&self, algorithm: HmacAlgorithm, key: &[u8]) -> Result<Box<dyn Mac>, CryptoError> {
        match algorithm {
            HmacAlgorithm::Sha1 => {
                let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key);
                Ok(Box::new(HmacSha1(key)))
            }
            other => Err(CryptoError::UnsupportedAlgorithm(CryptoAlgorithm::Hmac(
                other,
            ))),
        }
    }
}

struct HmacSha1(hmac::Key);

impl HmacSha1 {
    fn tag(&self, input: &[&[u8]]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        for part in input {
            context.update(part);
        }
        context.sign()
    }
}

impl Mac for HmacSha1 {
    fn output_len(&self) -> usize {
        hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY
            .digest_algorithm()
            .output_len()
    }

    fn sign(&mut self, input: &[&[u8]], output: &mut [u8]) -> Result<(), CryptoError> {
        let (tag, actual) = (self.tag(input), output.len());
        let expected = tag.as_ref().len();
        if actual != expected {
            return Err(CryptoError::InvalidTagLength { expected, actual });
        }
        output.copy_from_slice(tag.as_ref());
        Ok(())
    }

    fn verify(&mut self, input: &[&[u8]], expected: &[u8]) -> Result<(), CryptoError> {
        constant_time::verify_slices_are_equal(self.tag(input).as_ref(), expected)
            .map_err(|_| CryptoError::AuthenticationFailed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 1321, and that of RFC 2202, section 3 (case 2).
    #[test]
    fn digests_are_those_of_the_standards() {
        let crypto = TurnCrypto;
        let hash = crypto.hash(HashAlgorithm::Md5, b"message digest").unwrap();
        assert_eq!(hex(&hash), "f96b697d7cb7938d525a2f31aaf161d0");
        let mut mac = crypto.new_hmac(HmacAlgorithm::Sha1, b"Jefe").unwrap();
        let (mut tag, input) = ([0; 20], [&b"what do ya want "[..], b"for nothing?"]);
        mac.sign(&input, &mut tag).unwrap();
        assert_eq!(hex(&tag), "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79");
        assert!(mac.verify(&input, &tag).is_ok());
        tag[0] ^= 1;
        assert!(mac.verify(&input, &tag).is_err());
    }

    fn hex(bytes: &[u8]) -> String {
        bytes
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }
}
