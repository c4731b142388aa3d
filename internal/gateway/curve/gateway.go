package curve

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
)

// Backend is the part of the control API that the gateway stands on.
type Backend interface {
	api.Versions
	api.Names
	api.Trash
	api.Users
	api.Tasks
	CreateVolume(ctx context.Context, r *atollv1.CreateVolumeRequest) (*atollv1.Volume, error)
	Volume(ctx context.Context, name string, open bool) (*atollv1.Volume, error)
	Volumes(ctx context.Context, after string, limit int) ([]*atollv1.Volume, error)
	ResizeVolume(ctx context.Context, name string, size int64, shrink bool) (*atollv1.Volume, error)
}

// DefaultRootPassword is what a Curve cluster is shipped with.
const DefaultRootPassword = "root_password"

// Options configure a gateway. Backend is required.
type Options struct {
	Backend Backend
	// Cluster is the cluster's id, which clients ask for.
	Cluster string
	// RootPassword is root's while the cluster's user root has none of its own
	// (DefaultRootPassword).
	RootPassword string
	// Sizes are the lengths that volumes may have (CurveSizes).
	Sizes Sizes
	// PreciseOpen answers a refused open with its true code; Curve's clients
	// know only -2 there.
	PreciseOpen bool
	// Strict asks every user to prove a password; who has none is refused. By
	// default that is asked of root and of users that are marked strict only.
	Strict bool
	// DefaultLimits gives new volumes the limits that Curve computes from their
	// length.
	DefaultLimits bool
	// Deadline bounds a call (15 s), and a snapshot or clone four times as much.
	Deadline time.Duration

	Log     *slog.Logger
	Metrics *Metrics
}

// Gateway answers Curve's clients. It is an http.Handler for /curve/v1/ and
// /SnapshotCloneService; its methods may be called concurrently. It holds no
// goroutine and needs no closing.
type Gateway struct {
	o      Options
	b      Backend
	calls  map[string]callFunc
	mounts mounts
	users  users
	bin    bin
}

// callFunc carries out one call.
type callFunc func(*Gateway, context.Context, *call, *reply) error

// New returns a gateway.
func New(o Options) *Gateway {
	o.RootPassword = cmp.Or(o.RootPassword, DefaultRootPassword)
	o.Sizes = cmp.Or(o.Sizes, CurveSizes())
	o.Deadline = cmp.Or(o.Deadline, 15*time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	g := &Gateway{o: o, b: o.Backend, calls: calls()}
	g.mounts.init()
	return g
}

// calls is the table of all calls under /curve/v1/.
func calls() map[string]callFunc {
	return map[string]callFunc{
		"open": (*Gateway).open, "close": (*Gateway).close,
		"create": (*Gateway).create, "extend": (*Gateway).extend, "stat": (*Gateway).stat,
		"unlink": (*Gateway).unlink, "deleteforce": (*Gateway).deleteForce, "recover": (*Gateway).recover,
		"rename": (*Gateway).rename, "changeowner": (*Gateway).changeOwner,
		"listdir": (*Gateway).listDir, "mkdir": (*Gateway).makeDir, "rmdir": (*Gateway).unlink, // one and the same there
		"clusterid": (*Gateway).clusterID, "poolsets": (*Gateway).poolsets, "throttle": (*Gateway).throttle,
	}
}

// call is the body of a request: who calls, and the arguments, most absent.
type call struct {
	Owner    string `json:"owner"`
	Password string `json:"password"`

	Path        string `json:"path"`
	NewPath     string `json:"new_path"`
	NewOwner    string `json:"new_owner"`
	Length      uint64 `json:"length"`
	Poolset     string `json:"poolset"`
	StripeUnit  uint64 `json:"stripe_unit"`
	StripeCount uint64 `json:"stripe_count"`
	FileID      uint64 `json:"file_id"`
	Session     string `json:"session"`
	Precise     bool   `json:"precise"`

	Throttle    string `json:"throttle"` // IOPS_TOTAL …
	Limit       int64  `json:"limit"`
	Burst       int64  `json:"burst"`
	BurstLength int64  `json:"burst_length"`

	host   string // that the client called
	local  bool   // the client is on this machine
	strict bool   // every user must prove a password
}

// reply is the body of an answer.
type reply struct {
	Code    int    `json:"code"` // 0 or less
	Message string `json:"message,omitempty"`

	Session  string   `json:"session,omitempty"`
	URLs     []string `json:"urls,omitempty"` // of NBD exports, best first
	Length   int64    `json:"length,omitempty"`
	File     *File    `json:"file,omitempty"`
	Files    []File   `json:"files,omitempty"`
	Cluster  string   `json:"cluster,omitempty"`
	Poolsets []string `json:"poolsets,omitempty"`
}

// maxBody bounds a request.
const maxBody = 64 << 10

// ServeHTTP implements http.Handler.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) { g.serve(w, r, g.o.Strict) }

// Strict returns a handler for the same as g, but strict whatever the options
// say, for addresses that others can reach.
func (g *Gateway) Strict() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, true) })
}

// serve answers a request.
func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, strict bool) {
	path := strings.TrimSuffix(r.URL.Path, "/")
	if path == "/SnapshotCloneService" {
		g.serveSnapshots(w, r, strict)
		return
	}
	name, ok := strings.CutPrefix(path, "/curve/v1/")
	fn := g.calls[name]
	switch {
	case !ok || fn == nil:
		http.Error(w, "no such call", http.StatusNotFound)
		return
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "want POST with a JSON object", http.StatusMethodNotAllowed)
		return
	case !strings.HasPrefix(r.Header.Get("Content-Type"), "application/json"):
		http.Error(w, "want Content-Type: application/json", http.StatusUnsupportedMediaType)
		return
	}
	start := time.Now()
	var out reply
	err := g.serveCall(r, fn, strict, &out)
	code := CodeOf(err)
	if err != nil {
		out = reply{Code: -int(code), Message: err.Error()}
	}
	g.o.Metrics.done("call", name, -int(code), time.Since(start))
	writeJSON(w, http.StatusOK, &out)
}

// serveCall decodes a request and carries it out within the deadline.
func (g *Gateway) serveCall(r *http.Request, fn callFunc, strict bool, out *reply) error {
	in := &call{host: r.Host, local: isLocal(r), strict: strict}
	dec := json.NewDecoder(io.LimitReader(r.Body, maxBody))
	if err := dec.Decode(in); err != nil {
		return refuse(ParamError, fmt.Sprintf("request is not a JSON object of the right form: %v", err))
	}
	ctx, cancel := context.WithTimeout(r.Context(), g.o.Deadline)
	defer cancel()
	err := fn(g, ctx, in, out)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && CodeOf(err) != OK {
		return refuse(Failed, fmt.Sprintf("not done within %v: %v", g.o.Deadline, err))
	}
	return err
}

// writeJSON sends v as Curve's servers lay it out.
func writeJSON(w http.ResponseWriter, status int, v any) {
	text, err := json.MarshalIndent(v, "", "   ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(text, '\n'))
}

// isLocal reports whether a request came over a Unix socket or over loopback, so
// that its sender can reach this machine's Unix sockets.
func isLocal(r *http.Request) bool {
	addr := r.RemoteAddr
	return addr == "" || addr == "@" || strings.HasPrefix(addr, "/") || strings.HasPrefix(addr, "127.") || strings.HasPrefix(addr, "[::1]")
}
