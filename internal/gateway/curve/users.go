package curve

import (
	"context"
	"crypto/subtle"
	"errors"
	"sync"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// usersAge is how old the list of users may be that decides who is strict.
const usersAge = time.Second

// users remembers for a moment who must prove a password.
type users struct {
	mu struct {
		sync.Mutex // held for memory work only
		read       time.Time
		list       map[string]*atollv1.User
	}
}

// authenticate says whether the caller may speak for the owner it names (R2).
func (g *Gateway) authenticate(ctx context.Context, in *call) error {
	if in.Owner == "" {
		return refuse(AuthFail, "the owner is empty")
	}
	if in.strict {
		return g.prove(ctx, in.Owner, in.Password)
	}
	user, err := g.user(ctx, in.Owner)
	switch {
	case err != nil:
		return err
	case in.Owner == rootUser && !user.GetHasPassword():
		if subtle.ConstantTimeCompare([]byte(in.Password), []byte(g.o.RootPassword)) != 1 {
			return refuse(AuthFail, "root's password is wrong")
		}
	case in.Owner == rootUser || user.GetStrict():
		return g.prove(ctx, in.Owner, in.Password)
	}
	return nil
}

// user returns the record of a user, nil for one that has none.
func (g *Gateway) user(ctx context.Context, name string) (*atollv1.User, error) {
	u := &g.users
	u.mu.Lock()
	list, fresh := u.mu.list, u.mu.list != nil && time.Since(u.mu.read) < usersAge
	u.mu.Unlock()
	if fresh {
		return list[name], nil
	}
	now := time.Now()
	resp, err := g.b.ListUsers(ctx, &atollv1.ListUsersRequest{})
	if err != nil {
		return nil, err
	}
	list = make(map[string]*atollv1.User, len(resp.Users))
	for _, x := range resp.Users {
		list[x.Name] = x
	}
	u.mu.Lock()
	u.mu.list, u.mu.read = list, now
	u.mu.Unlock()
	return list[name], nil
}

// prove checks a password. Servers remember which were right, so that this is
// quick from the second time on.
func (g *Gateway) prove(ctx context.Context, name, password string) error {
	_, err := g.b.Authenticate(ctx, &atollv1.AuthenticateRequest{Name: name, Password: password})
	if errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrDenied) || errors.Is(err, atoll.ErrInvalid) {
		return refuse(AuthFail, "the password of "+name+" is wrong")
	}
	return err
}
