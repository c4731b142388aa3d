package catalog

import (
	"context"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/argon2"

	"github.com/atollstore/atoll/internal/atoll"
)

// User is someone who owns things. root is always there, with or without a
// record.
type User struct {
	Name    string    `json:"name"`
	Hash    string    `json:"hash,omitempty"`   // of the password, as HashPassword makes it; empty: none
	Strict  bool      `json:"strict,omitempty"` // whoever uses the name must prove the password
	Admin   bool      `json:"admin,omitempty"`
	Created time.Time `json:"created"`
	Rev     int64     `json:"-"`
}

// Root is the user that is always there.
const Root = rootOwner

// The cost of hashing a password: 19 MiB of memory twice over, on one core.
const (
	hashMemory = 19 << 10 // KiB
	hashTime   = 2
	hashBytes  = 32
	hashSalt   = 16
	maxSecret  = 1024
)

// HashPassword returns what is kept of a password:
//
//	$argon2id$v=19$m=19456,t=2,p=1$<salt>$<hash>
func (c *Catalog) HashPassword(password string) (string, error) {
	if password == "" || len(password) > maxSecret {
		return "", fmt.Errorf("password of %d bytes: want 1 to %d: %w", len(password), maxSecret, atoll.ErrInvalid)
	}
	var salt [hashSalt]byte
	c.random.fill(salt[:])
	sum := argon2.IDKey([]byte(password), salt[:], hashTime, hashMemory, 1, hashBytes)
	enc := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=1$%s$%s", argon2.Version, hashMemory, hashTime, enc.EncodeToString(salt[:]), enc.EncodeToString(sum)), nil
}

// Verify checks a password; ErrDenied when it is wrong or the user has none. It
// costs what HashPassword does.
func (u *User) Verify(password string) error {
	wrong := fmt.Errorf("password of user %q is wrong: %w", u.Name, atoll.ErrDenied)
	if len(password) > maxSecret {
		return wrong
	}
	part := strings.Split(u.Hash, "$")
	if len(part) != 6 || part[1] != "argon2id" {
		return fmt.Errorf("user %q has no password: %w", u.Name, atoll.ErrDenied)
	}
	var version int
	var memory, rounds uint32
	var threads uint8
	if _, err := fmt.Sscanf(part[2]+" "+part[3], "v=%d m=%d,t=%d,p=%d", &version, &memory, &rounds, &threads); err != nil ||
		version != argon2.Version || memory > 1<<20 || rounds > 100 || threads == 0 {
		return fmt.Errorf("hash of the password of user %q: %w", u.Name, atoll.ErrCorrupt)
	}
	enc := base64.RawStdEncoding
	salt, err := enc.DecodeString(part[4])
	want, err2 := enc.DecodeString(part[5])
	if err != nil || err2 != nil || len(want) != hashBytes {
		return fmt.Errorf("hash of the password of user %q: %w", u.Name, atoll.ErrCorrupt)
	}
	got := argon2.IDKey([]byte(password), salt, rounds, memory, threads, hashBytes)
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return wrong
	}
	return nil
}

// CheckUserName refuses what cannot be a user's name.
func CheckUserName(name string) error {
	if err := ValidateName(name); err != nil || strings.Contains(name, "/") {
		return fmt.Errorf("user name %q: want 1 to %d characters without \"/\", \"@\" and control characters: %w", name, maxElement, atoll.ErrInvalid)
	}
	return nil
}

func decodeUser(kv KeyValue) (User, error) {
	var u User
	err := decode(kv, &u)
	u.Rev = kv.Mod
	return u, err
}

// CreateUser records a user. ErrExist, ErrInvalid for a bad name; root, of which
// there is no record at first, may be created once, too.
func (c *Catalog) CreateUser(ctx context.Context, u User) (User, error) {
	if err := CheckUserName(u.Name); err != nil {
		return User{}, err
	}
	if u.Created.IsZero() {
		u.Created = now()
	}
	u.Rev = 0
	u.Admin = u.Admin || u.Name == Root
	return c.putUser(ctx, u)
}

// UpdateUser replaces a user's record that was read at u.Rev. ErrConflict when
// it was changed since.
func (c *Catalog) UpdateUser(ctx context.Context, u User) (User, error) {
	if u.Name == Root && !u.Admin {
		return User{}, fmt.Errorf("root is always an administrator: %w", atoll.ErrInvalid)
	}
	return c.putUser(ctx, u)
}

func (c *Catalog) putUser(ctx context.Context, u User) (User, error) {
	ctx, done := bound(ctx)
	defer done()
	key, w := userKey(u.Name), c.mark()
	res, ok, err := c.commit(ctx, w, Txn{If: []Cmp{{Key: key, Rev: u.Rev}}, Then: []Op{{Key: key, Value: encode(w, u)}}, Read: []string{key}})
	if err == nil && !ok {
		err = atoll.ErrConflict
		if u.Rev == 0 {
			err = atoll.ErrExist
		}
	}
	if err != nil {
		return User{}, fmt.Errorf("record user %q: %w", u.Name, err)
	}
	u.Rev = res.Rev
	return u, nil
}

// User returns a user's record; ErrNotExist. That of root with Rev 0 is not
// recorded.
func (c *Catalog) User(ctx context.Context, name string) (User, error) {
	if err := CheckUserName(name); err != nil {
		return User{}, err
	}
	ctx, done := bound(ctx)
	defer done()
	got, err := c.read(ctx, userKey(name))
	switch {
	case err != nil:
	case got[0].Mod != 0:
		return decodeUser(got[0])
	case name == Root:
		return User{Name: Root, Admin: true, Created: c.State().Cluster.Created}, nil
	default:
		err = atoll.ErrNotExist
	}
	return User{}, fmt.Errorf("find user %q: %w", name, err)
}

// Users returns all users, in the order of their names.
func (c *Catalog) Users(ctx context.Context) ([]User, error) {
	ctx, done := bound(ctx)
	defer done()
	kvs, _, err := c.scan(ctx, userPrefix, "", 0)
	if err != nil {
		return nil, fmt.Errorf("list users: %w", err)
	}
	var out []User
	seen := false
	add := func(u User) {
		if !seen && u.Name >= Root {
			if seen = true; u.Name != Root {
				out = append(out, User{Name: Root, Admin: true, Created: c.State().Cluster.Created})
			}
		}
		if u.Name != "" {
			out = append(out, u)
		}
	}
	for _, kv := range kvs {
		u, err := decodeUser(kv)
		if err != nil {
			return nil, fmt.Errorf("list users: %w", err)
		}
		add(u)
	}
	if !seen {
		out = append(out, User{Name: Root, Admin: true, Created: c.State().Cluster.Created})
	}
	return out, nil
}

// RemoveUser removes a user's record. What it owns stays as it is. ErrNotExist;
// ErrInvalid for root.
func (c *Catalog) RemoveUser(ctx context.Context, name string) error {
	if name == Root {
		return fmt.Errorf("remove user root: it is always there: %w", atoll.ErrInvalid)
	}
	if err := CheckUserName(name); err != nil {
		return err
	}
	ctx, done := bound(ctx)
	defer done()
	key := userKey(name)
	got, err := c.read(ctx, key)
	if err == nil && got[0].Mod == 0 {
		err = atoll.ErrNotExist
	}
	if err == nil {
		_, _, err = c.commit(ctx, "", Txn{If: []Cmp{{Key: key, Rev: got[0].Mod}}, Then: []Op{{Key: key, Delete: true}}, Read: []string{key}})
	}
	if err != nil {
		return fmt.Errorf("remove user %q: %w", name, err)
	}
	return nil
}
