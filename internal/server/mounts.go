package server

import (
	"crypto/rand"
	"encoding/hex"
	"net/http"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/gateway/curve"
)

// mounts are the doors for clients of Curve. Their protocol has no bearer token;
// who they are they say themselves, and on addresses that others can reach they
// prove it.
func (s *Server) mounts(b *backend) []api.Mount {
	o := curve.Options{
		Backend: b, Cluster: s.cluster.ID.String(), RootPassword: s.cfg.CurveRoot,
		PreciseOpen: s.cfg.CurveOpen, DefaultLimits: s.cfg.CurveLimit,
		Log: s.log, Metrics: curve.NewMetrics(s.reg),
	}
	if s.cfg.CurveSizes == "any" {
		o.Sizes = curve.AnySizes()
	}
	g := curve.New(o)
	var tcp http.Handler = g
	if !s.curveTrusts() {
		tcp = g.Strict()
	}
	var out []api.Mount
	for _, path := range []string{"/curve/v1/", "/SnapshotCloneService", "/SnapshotCloneService/"} {
		out = append(out, api.Mount{Path: path, TCP: tcp, Unix: g})
	}
	return out
}

// curveTrusts reports whether Curve's clients on TCP are believed who they are.
func (s *Server) curveTrusts() bool {
	return s.cfg.CurveAuth == "trust" || s.cfg.CurveAuth == "" && loopback(s.cfg.Listen)
}

// newID draws an id for something that lives for a while, such as an import.
func (s *Server) newID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
