package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/pki"
)

// tokenPath is where the record of a join token is kept; its secret is not.
func (h *home) tokenPath(id string) string { return h.path("tokens", id+".json") }

// CreateToken implements api.Backend.
func (b *backend) CreateToken(_ context.Context, ttl time.Duration) (string, time.Time, error) {
	h := b.s.home
	if h.ca == nil {
		return "", time.Time{}, api.WithHint(fmt.Errorf("this server does not keep the cluster's authority: %w", atoll.ErrUnsupported), "ask the server that founded the cluster")
	}
	if ttl == 0 {
		ttl = time.Hour
	}
	if ttl > 24*time.Hour {
		return "", time.Time{}, fmt.Errorf("a token for %s: want at most 24h: %w", ttl, atoll.ErrInvalid)
	}
	tok, rec, err := pki.NewToken(h.ca.Hash(), []string{"controller", "node", "gateway"}, ttl, time.Now())
	if err != nil {
		return "", time.Time{}, err
	}
	text, err := json.Marshal(rec)
	if err == nil {
		err = os.MkdirAll(h.path("tokens"), 0o700)
	}
	if err == nil {
		err = writeFile(h.tokenPath(rec.ID), text)
	}
	return tok.Text(), rec.Expires, err
}

// Join implements api.Backend.
func (b *backend) Join(ctx context.Context, r *atollv1.JoinRequest) (*atollv1.JoinResponse, error) {
	h := b.s.home
	if h.ca == nil {
		return nil, fmt.Errorf("this server does not keep the cluster's authority; join through the one that founded it: %w", atoll.ErrUnsupported)
	}
	tok, err := pki.ParseToken(r.Token)
	if err != nil {
		return nil, err
	}
	var rec pki.TokenRecord
	text, err := os.ReadFile(h.tokenPath(tok.ID))
	if err != nil || json.Unmarshal(text, &rec) != nil {
		return nil, fmt.Errorf("join token %s is not known here: %w", tok.ID, atoll.ErrDenied)
	}
	if err := rec.Verify(tok.ID, tok.Secret, time.Now()); err != nil {
		return nil, err
	}
	id := newMemberID()
	cert, err := h.ca.IssueRequest(r.Csr, pki.Grant{Member: id, Roles: r.Roles, Hosts: localHosts()}, time.Now())
	if err != nil {
		return nil, err
	}
	resp := &atollv1.JoinResponse{Certificate: cert, Ca: h.ca.CertPEM(), ClusterId: b.s.cluster.ID.String(), MemberId: id}
	for _, p := range b.s.cat.State().Processes {
		for _, role := range p.Roles {
			if role == "controller" && p.Wire != "" {
				resp.Members = append(resp.Members, p.Wire)
			}
		}
	}
	if r.PeerUrl != "" {
		if b.s.etcd == nil {
			return nil, fmt.Errorf("the catalog is an external etcd; join without the controller role: %w", atoll.ErrUnsupported)
		}
		initial, err := b.addController(ctx, id, strings.TrimPrefix(r.PeerUrl, "https://"))
		if err != nil {
			return nil, err
		}
		parts := make([]string, 0, len(initial))
		for name, addr := range initial {
			parts = append(parts, name+"="+addr)
		}
		sort.Strings(parts)
		resp.InitialCluster = strings.Join(parts, ",")
	}
	// One token admits one server.
	if err := os.Remove(h.tokenPath(tok.ID)); err != nil {
		return nil, errors.Join(fmt.Errorf("use up join token %s", tok.ID), err)
	}
	b.s.log.Info("server admitted", "member", id, "roles", r.Roles)
	return resp, nil
}

// addController lets an etcd member join. Only one at a time may be catching up,
// so others wait.
func (b *backend) addController(ctx context.Context, id, peer string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		initial, err := b.s.etcd.AddMember(ctx, id, peer)
		if err == nil {
			return initial, nil
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}
