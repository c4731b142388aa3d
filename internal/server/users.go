package server

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// logins remembers which passwords were right, so that the cost of checking one
// is paid once for each password and server. Only a keyed hash under a key of
// this process is kept. Hashing is bounded: it takes 19 MiB each time.
type logins struct {
	key  [32]byte
	hash chan struct{} // room for those that hash at a time
	mu   struct {
		sync.Mutex
		right map[string]login // by user
	}
}

// login says that a password belongs to a stored hash.
type login struct {
	stored string
	sum    [sha256.Size]byte
}

const (
	maxHashing = 2
	maxLogins  = 10000
)

func newLogins() *logins {
	l := &logins{hash: make(chan struct{}, maxHashing)}
	rand.Read(l.key[:])
	l.mu.right = map[string]login{}
	return l
}

// verify is u.Verify with a memory.
func (l *logins) verify(ctx context.Context, u catalog.User, password string) error {
	mac := hmac.New(sha256.New, l.key[:])
	mac.Write([]byte(password))
	now := login{stored: u.Hash}
	mac.Sum(now.sum[:0])
	l.mu.Lock()
	known := u.Hash != "" && l.mu.right[u.Name] == now
	l.mu.Unlock()
	if known {
		return nil
	}
	select {
	case l.hash <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("check the password of user %q: %w", u.Name, atoll.ErrTimeout)
	}
	err := u.Verify(password)
	<-l.hash
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.mu.right) >= maxLogins {
		clear(l.mu.right)
	}
	l.mu.right[u.Name] = now
	return nil
}

// Authenticate implements api.Users.
func (b *backend) Authenticate(ctx context.Context, r *atollv1.AuthenticateRequest) (*atollv1.User, error) {
	u, err := b.s.cat.User(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if u.Hash == "" {
		if u.Strict {
			return nil, api.WithHint(fmt.Errorf("user %q must prove a password and has none: %w", u.Name, atoll.ErrDenied), fmt.Sprintf("set one with %q", "atoll user passwd "+u.Name))
		}
		return nil, fmt.Errorf("user %q has no password: %w", u.Name, atoll.ErrNotExist)
	}
	if err := b.s.logins.verify(ctx, u, r.Password); err != nil {
		return nil, err
	}
	return userMessage(u), nil
}

func userMessage(u catalog.User) *atollv1.User {
	return &atollv1.User{Name: u.Name, HasPassword: u.Hash != "", Strict: u.Strict, Admin: u.Admin, Created: timestamppb.New(u.Created)}
}

// CreateUser implements api.Users.
func (b *backend) CreateUser(ctx context.Context, r *atollv1.CreateUserRequest) (*atollv1.User, error) {
	u := catalog.User{Name: r.Name, Strict: r.Strict, Admin: r.Admin}
	if r.Strict && r.Password == "" {
		return nil, api.WithHint(fmt.Errorf("user %q: strict without a password could never log in: %w", r.Name, atoll.ErrInvalid), "give a password, or leave strict out")
	}
	if r.Password != "" {
		hash, err := b.s.cat.HashPassword(r.Password)
		if err != nil {
			return nil, err
		}
		u.Hash = hash
	}
	u, err := b.s.cat.CreateUser(ctx, u)
	if errors.Is(err, atoll.ErrExist) {
		return nil, api.WithHint(err, fmt.Sprintf("%q changes its password", "atoll user passwd "+r.Name))
	}
	if err != nil {
		return nil, err
	}
	return userMessage(u), nil
}

// ListUsers implements api.Users.
func (b *backend) ListUsers(ctx context.Context, _ *atollv1.ListUsersRequest) (*atollv1.ListUsersResponse, error) {
	users, err := b.s.cat.Users(ctx)
	if err != nil {
		return nil, err
	}
	out := &atollv1.ListUsersResponse{}
	for _, u := range users {
		out.Users = append(out.Users, userMessage(u))
	}
	return out, nil
}

// UpdateUser implements api.Users. An empty password takes the password away.
func (b *backend) UpdateUser(ctx context.Context, r *atollv1.UpdateUserRequest) (*atollv1.User, error) {
	for range maxTries {
		u, err := b.s.cat.User(ctx, r.Name)
		if err != nil {
			return nil, err
		}
		if r.Password != nil {
			u.Hash = ""
			if *r.Password != "" {
				if u.Hash, err = b.s.cat.HashPassword(*r.Password); err != nil {
					return nil, err
				}
			}
		}
		if r.Strict != nil {
			u.Strict = *r.Strict
		}
		if r.Admin != nil {
			u.Admin = *r.Admin
		}
		if u.Strict && u.Hash == "" {
			return nil, api.WithHint(fmt.Errorf("user %q: strict without a password could never log in: %w", r.Name, atoll.ErrInvalid), "give a password, or leave strict out")
		}
		u, err = b.s.cat.UpdateUser(ctx, u)
		if err == nil {
			return userMessage(u), nil
		}
		if !errors.Is(err, atoll.ErrConflict) && !errors.Is(err, atoll.ErrExist) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("change user %q: %w", r.Name, atoll.ErrConflict)
}

// DeleteUser implements api.Users.
func (b *backend) DeleteUser(ctx context.Context, r *atollv1.DeleteUserRequest) (*atollv1.DeleteUserResponse, error) {
	return &atollv1.DeleteUserResponse{}, b.s.cat.RemoveUser(ctx, r.Name)
}

// maxTries bounds how often a change of a record is tried that others change at
// the same time.
const maxTries = 16
