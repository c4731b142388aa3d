package server

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/pki"
)

// checkPorts finds out before anything is started whether the server's ports can
// be had, so that the message names the setting to change.
func (s *Server) checkPorts(context.Context, context.Context) error {
	const hint = "is another server running? --listen HOST:PORT chooses another address; the two ports after it serve the members"
	addrs := []string{s.cfg.Listen, portAfter(s.cfg.Listen, 1)}
	if s.cfg.has("controller") && len(s.cfg.Etcd) == 0 && !s.opts.Demo {
		addrs = append(addrs, portAfter(s.cfg.Listen, 2))
	}
	for _, addr := range addrs {
		l, err := host.TCP{}.Listen(addr)
		if err == nil {
			err = l.Close()
		}
		if err != nil {
			return api.WithHint(fmt.Errorf("setting listen = %q: %w", s.cfg.Listen, err), hint)
		}
	}
	return nil
}

// sameCluster refuses a data directory of another cluster than the one that the
// token was made for: the directory would win without a word.
func (h *home) sameCluster(cfg *Config) error {
	if cfg.Token == "" {
		return nil
	}
	tok, err := pki.ParseToken(cfg.Token)
	if err != nil {
		return nil //nolint:nilerr // the token was used up when the directory joined
	}
	if tok.CAHash != h.identity.Member().CAHash() {
		return api.WithHint(fmt.Errorf("it belongs to cluster %v already, the token is of another: %w", h.rec.Cluster, atoll.ErrIdentity),
			"choose an empty directory with --data to join that cluster, or leave --join and --token out")
	}
	return nil
}
