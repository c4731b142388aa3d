package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// A join token:
//
//	A1<sha256 of the CA certificate: 64 hex digits>::<id: 16 hex digits>.<secret: 32 base32 digits>
const (
	tokenPrefix = "A1"
	idBytes     = 8
	secretBytes = 20
	// MaxTokenLife is the longest life of a join token.
	MaxTokenLife = 7 * 24 * time.Hour
)

// Secret is text that must not appear in logs. It prints as "***".
type Secret string

// String hides the secret.
func (Secret) String() string { return "***" }

// GoString hides the secret.
func (Secret) GoString() string { return "***" }

// Token is a join token as its holder knows it.
type Token struct {
	CAHash string // of the CA to expect, 64 hexadecimal digits
	ID     string
	Secret Secret
}

// Text returns the whole token with its secret, to be shown once.
func (t Token) Text() string {
	return tokenPrefix + t.CAHash + "::" + t.ID + "." + string(t.Secret)
}

// TokenRecord is a join token as the cluster keeps it.
type TokenRecord struct {
	ID      string    `json:"id"`
	Sum     string    `json:"sum"` // SHA-256 of the secret, hexadecimal
	Roles   []string  `json:"roles"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// NewToken makes a token for joiners with the given roles, valid from now for
// life, and the record that the cluster keeps of it. ErrInvalid for a life that
// is not positive or above MaxTokenLife.
func NewToken(caHash string, roles []string, life time.Duration, now time.Time) (Token, TokenRecord, error) {
	if life <= 0 || life > MaxTokenLife {
		return Token{}, TokenRecord{}, fmt.Errorf("make token for %v: want more than 0 and at most %v: %w", life, MaxTokenLife, atoll.ErrInvalid)
	}
	var raw [idBytes + secretBytes]byte
	rand.Read(raw[:]) // never fails
	t := Token{CAHash: caHash, ID: hex.EncodeToString(raw[:idBytes]), Secret: Secret(secretCoding().EncodeToString(raw[idBytes:]))}
	if _, err := ParseToken(t.Text()); err != nil {
		return Token{}, TokenRecord{}, err
	}
	return t, TokenRecord{ID: t.ID, Sum: secretSum(t.Secret), Roles: roles, Created: now, Expires: now.Add(life)}, nil
}

// ParseToken is the inverse of Token.Text. Its errors do not contain the secret.
func ParseToken(text string) (Token, error) {
	bad := func(why string) (Token, error) {
		return Token{}, fmt.Errorf("parse join token: %s: %w", why, atoll.ErrInvalid)
	}
	rest, ok := strings.CutPrefix(strings.TrimSpace(text), tokenPrefix)
	if !ok {
		return bad("it does not begin with " + tokenPrefix)
	}
	hash, rest, ok1 := strings.Cut(rest, "::")
	id, secret, ok2 := strings.Cut(rest, ".")
	if !ok1 || !ok2 {
		return bad("want A1<hash>::<id>.<secret>; is it cut off?")
	}
	if sum, err := hex.DecodeString(hash); err != nil || len(sum) != sha256.Size || strings.ToLower(hash) != hash {
		return bad("the hash is not 64 hexadecimal digits")
	}
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != idBytes || strings.ToLower(id) != id {
		return bad("the id is not 16 hexadecimal digits")
	}
	if raw, err := secretCoding().DecodeString(secret); err != nil || len(raw) != secretBytes || len(secret) != secretCoding().EncodedLen(secretBytes) {
		return bad("the secret is incomplete")
	}
	return Token{CAHash: hash, ID: id, Secret: Secret(secret)}, nil
}

// Verify checks what a joiner presents. ErrDenied, without saying more than
// that it expired, if it may not join.
func (r *TokenRecord) Verify(id string, secret Secret, now time.Time) error {
	same := subtle.ConstantTimeCompare([]byte(secretSum(secret)), []byte(r.Sum)) == 1
	if !same || id != r.ID {
		return fmt.Errorf("check join token %q: it is not valid: %w", id, atoll.ErrDenied)
	}
	if !now.Before(r.Expires) {
		return fmt.Errorf("check join token %q: it expired at %v: %w", id, r.Expires.UTC().Format(time.RFC3339), atoll.ErrDenied)
	}
	return nil
}

func secretSum(s Secret) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

func secretCoding() *base32.Encoding {
	return base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)
}
