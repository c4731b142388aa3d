// Package pki is who is who in a cluster: its certificate authority, the
// certificates of its members, the tokens with which new members join, and the
// TLS configurations made from them.
//
// Words: the CA belongs to one cluster. A member is a server process with a
// certificate from it, which names cluster and member as a URI,
//
//	atoll://<cluster>/member/<id>
//
// and its roles as organisational units. Both ends of a connection between
// members show one (TLS 1.3); each checks that it comes from its own CA, is
// within its time, and names its own cluster. A client can also demand a
// certain member.
//
// A join token carries the hash of the CA's certificate and a secret:
//
//	A1<sha256 of the CA certificate, 64 hex digits>::<id>.<secret>
//
// The joiner first checks that the server's chain ends in exactly that CA, and
// only then sends the secret with a certificate request. The cluster keeps the
// SHA-256 of the secret and the token's expiry, never the secret.
//
// Private keys are ECDSA P-256, in files with mode 0600 in a directory with mode
// 0700. Errors that mean "not one of us" wrap atoll.ErrIdentity, refused tokens
// atoll.ErrDenied, unreadable files atoll.ErrInvalid or atoll.ErrNotExist.
//
// The package opens no connections and does not know how certificates travel.
package pki
