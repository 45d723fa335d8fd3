//! What the HTTP server requires of its clients' certificates, with the meaning that exporter-toolkit gives to
//! `client_auth_type`, `client_ca_file` and `client_allowed_sans`.

use std::net::IpAddr;
use std::sync::Arc;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, UnixTime};
use strum::VariantArray;
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// `client_auth_type`, in the words of Go's `tls.ClientAuthType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, strum::IntoStaticStr, VariantArray)]
pub(super) enum ClientAuth {
    #[default]
    NoClientCert,
    RequestClientCert,
    /// An older name of [`ClientAuth::RequireAnyClientCert`].
    RequireClientCert,
    RequireAnyClientCert,
    VerifyClientCertIfGiven,
    RequireAndVerifyClientCert,
}

impl ClientAuth {
    pub(super) fn name(self) -> &'static str {
        self.into()
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        let mut all = Self::VARIANTS.iter().copied();
        all.find(|auth| auth.name() == name)
    }

    fn is_mandatory(self) -> bool {
        match self {
            Self::RequireClientCert
            | Self::RequireAnyClientCert
            | Self::RequireAndVerifyClientCert => true,
            Self::NoClientCert | Self::RequestClientCert | Self::VerifyClientCertIfGiven => false,
        }
    }

    /// Whether every client has proven who it is, before its first request.
    pub(super) fn identifies_every_client(self) -> bool {
        self.is_mandatory() && self.verifies()
    }

    /// Whether a certificate must come from the authority in `client_ca_file`.
    fn verifies(self) -> bool {
        match self {
            Self::VerifyClientCertIfGiven | Self::RequireAndVerifyClientCert => true,
            Self::NoClientCert
            | Self::RequestClientCert
            | Self::RequireClientCert
            | Self::RequireAnyClientCert => false,
        }
    }
}

/// The settings, with the content of the file.
#[derive(Default, Hash)]
pub(super) struct ClientRules {
    pub(super) auth: ClientAuth,
    /// The certificates of the authority, as PEM.
    pub(super) authority: Option<Vec<u8>>,
    /// A certificate must have one of these subject alternative names.
    pub(super) allowed_sans: Option<Vec<String>>,
}

impl ClientRules {
    /// Returns `None` if the server asks for no certificate.
    ///
    /// # Errors
    /// The settings contradict each other, or the file has no usable certificate. The text begins with a key.
    pub(super) fn verifier(
        &self,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Option<Arc<dyn ClientCertVerifier>>, String> {
        let name = self.auth.name();
        if self.auth == ClientAuth::NoClientCert {
            let useless = [
                ("client_ca_file", self.authority.is_some()),
                ("client_allowed_sans", self.allowed_sans.is_some()),
            ];
            return match useless.iter().find(|(_, is_set)| *is_set) {
                None => Ok(None),
                Some((key, _)) => Err(format!(
                    "{key} has no effect with client_auth_type {name}; set client_auth_type to {}",
                    ClientAuth::RequireAndVerifyClientCert.name()
                )),
            };
        }
        let chain = match (&self.authority, self.auth.verifies()) {
            (Some(pem), true) => Some(chain_verifier(pem, self.auth, provider)?),
            (None, true) => {
                return Err(format!(
                    "client_ca_file is missing: client_auth_type {name} checks certificates against it"
                ));
            }
            // exporter-toolkit accepts this and checks nothing. An operator who names an authority expects a check.
            (Some(_), false) => {
                return Err(format!(
                    "client_ca_file has no effect: client_auth_type {name} accepts a certificate of any authority"
                ));
            }
            (None, false) => None,
        };
        Ok(Some(Arc::new(ClientCertificates {
            mandatory: self.auth.is_mandatory(),
            chain,
            allowed_sans: self.allowed_sans.clone(),
            schemes: provider.signature_verification_algorithms,
        })))
    }
}

fn chain_verifier(
    pem: &[u8],
    auth: ClientAuth,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate =
            certificate.map_err(|error| format!("client_ca_file is not valid PEM: {error}"))?;
        roots.add(certificate).map_err(|error| {
            format!("client_ca_file has a certificate that cannot be used: {error}")
        })?;
    }
    if roots.is_empty() {
        return Err("client_ca_file has no PEM certificate".to_owned());
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    let verifier = if auth.is_mandatory() {
        verifier
    } else {
        verifier.allow_unauthenticated()
    };
    verifier
        .build()
        .map_err(|error| format!("client_ca_file cannot be used: {error}"))
}

#[derive(Debug)]
struct ClientCertificates {
    mandatory: bool,
    /// `None` accepts a certificate of any authority.
    chain: Option<Arc<dyn ClientCertVerifier>>,
    allowed_sans: Option<Vec<String>>,
    schemes: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for ClientCertificates {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        let chain = self.chain.as_ref();
        chain.map_or(&[], |chain| chain.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if let Some(chain) = &self.chain {
            chain.verify_client_cert(end_entity, intermediates, now)?;
        }
        if let Some(allowed) = &self.allowed_sans {
            let names = alternative_names(end_entity).ok_or(CertificateError::BadEncoding)?;
            if !names.iter().any(|name| allowed.contains(name)) {
                return Err(CertificateError::ApplicationVerificationFailure.into());
            }
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.schemes)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.schemes)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.supported_schemes()
    }
}

/// The subject alternative names that exporter-toolkit compares: DNS names, email addresses, IP addresses and URIs. `None` if
/// the certificate cannot be read.
fn alternative_names(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let certificate = Certificate::from_der(certificate).ok()?;
    let names = certificate.tbs_certificate().get_extension();
    let names: Option<(bool, SubjectAltName)> = names.ok()?;
    let Some((_, SubjectAltName(names))) = names else {
        return Some(Vec::new());
    };
    let text = |name: GeneralName| match name {
        GeneralName::DnsName(name)
        | GeneralName::Rfc822Name(name)
        | GeneralName::UniformResourceIdentifier(name) => Some(name.to_string()),
        GeneralName::IpAddress(bytes) => ip_address(bytes.as_bytes()).map(|ip| ip.to_string()),
        _ => None,
    };
    Some(names.into_iter().filter_map(text).collect())
}

fn ip_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
