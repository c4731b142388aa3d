package api

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/api/atollv1/atollv1connect"
	"github.com/atollstore/atoll/internal/atoll"
)

// Backend does what the API asks for. Its methods may be called concurrently,
// return errors of atoll's kinds, and end with their context.
type Backend interface {
	Status(ctx context.Context) (*atollv1.GetStatusResponse, error)
	Nodes(ctx context.Context) ([]*atollv1.Node, error)
	SetNode(ctx context.Context, req *atollv1.SetNodeRequest) (*atollv1.Node, error)
	Config(ctx context.Context) ([]*atollv1.Setting, error)
	Diagnose(ctx context.Context) ([]*atollv1.Finding, error)
	CreateToken(ctx context.Context, ttl time.Duration) (token string, expires time.Time, err error)
	Join(ctx context.Context, req *atollv1.JoinRequest) (*atollv1.JoinResponse, error)

	CreateVolume(ctx context.Context, req *atollv1.CreateVolumeRequest) (*atollv1.Volume, error)
	Volumes(ctx context.Context, after string, limit int) ([]*atollv1.Volume, error)
	Volume(ctx context.Context, name string, open bool) (*atollv1.Volume, error)
	ResizeVolume(ctx context.Context, name string, size int64, shrink bool) (*atollv1.Volume, error)
	SetRedundancy(ctx context.Context, req *atollv1.SetRedundancyRequest) (*atollv1.Volume, error)
	DeleteVolume(ctx context.Context, req *atollv1.DeleteVolumeRequest) (*atollv1.DeleteVolumeResponse, error)
	CheckVolume(ctx context.Context, req *atollv1.CheckVolumeRequest) (*atollv1.CheckVolumeResponse, error)

	Versions
	Names
	Trash
	Users
	Tasks
	Rights

	// Healthy returns nil when the server can serve.
	Healthy() error
}

// DemoBackend is the part that only a demo serves.
type DemoBackend interface {
	Inject(ctx context.Context, node atoll.NodeID, fault string, delay time.Duration) (string, error)
	AddNode(ctx context.Context) (node atoll.NodeID, path string, err error)
}

// Options configure the handlers.
type Options struct {
	Backend Backend
	Demo    DemoBackend  // nil outside a demo
	Metrics http.Handler // serves /metrics
	Token   string       // bearer token for TCP
	Mounts  []Mount      // what else is served under the same addresses
	Log     *slog.Logger
}

// Mount serves another protocol at a path, which ends in "/" for all below it.
// It needs no bearer token: the handlers look at who calls themselves. Requests
// that a browser sends on behalf of some page are refused before them.
type Mount struct {
	Path string
	TCP  http.Handler // nil: not served there
	Unix http.Handler // on the server's own socket, which only its user can reach
}

// NewHandlers returns the handler for TCP, which wants to know who calls, and the
// one for the Unix socket, where who says nothing is root.
func NewHandlers(o Options) (tcp, unix http.Handler) {
	mux := http.NewServeMux()
	serveCalls(mux, o)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if err := o.Backend.Healthy(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if o.Metrics != nil {
		mux.Handle("GET /metrics", o.Metrics)
	}
	serveProfiles(mux)
	private, public := http.NewServeMux(), http.NewServeMux()
	private.Handle("/", identify(o, true, mux))
	public.Handle("/", identify(o, false, http.NewCrossOriginProtection().Handler(mux)))
	for _, m := range o.Mounts {
		if m.Unix != nil {
			private.Handle(m.Path, m.Unix)
		}
		if m.TCP != nil {
			public.Handle(m.Path, refusePages(m.TCP))
		}
	}
	return public, private
}

// serveProfiles serves Go's profiles to root.
func serveProfiles(mux *http.ServeMux) {
	for path, h := range map[string]http.HandlerFunc{
		"": pprof.Index, "cmdline": pprof.Cmdline, "profile": pprof.Profile, "symbol": pprof.Symbol, "trace": pprof.Trace,
	} {
		mux.HandleFunc("/debug/pprof/"+path, func(w http.ResponseWriter, r *http.Request) {
			if !CallerOf(r.Context()).Root {
				http.Error(w, "profiles are for root", http.StatusForbidden)
				return
			}
			h(w, r)
		})
	}
}

// serveCalls registers the services.
func serveCalls(mux *http.ServeMux, o Options) {
	opts := []connect.HandlerOption{connect.WithInterceptors(serverInterceptor{o.Log, o.Backend}), connect.WithReadMaxBytes(1 << 20)}
	b := o.Backend
	mux.Handle(atollv1connect.NewClusterServiceHandler(clusterService{b}, opts...))
	mux.Handle(atollv1connect.NewVolumeServiceHandler(volumeService{b}, opts...))
	mux.Handle(atollv1connect.NewVersionServiceHandler(versionService{b}, opts...))
	mux.Handle(atollv1connect.NewNamespaceServiceHandler(nameService{b}, opts...))
	mux.Handle(atollv1connect.NewTrashServiceHandler(trashService{b}, opts...))
	mux.Handle(atollv1connect.NewUserServiceHandler(userService{b}, opts...))
	mux.Handle(atollv1connect.NewTaskServiceHandler(taskService{b}, opts...))
	if o.Demo != nil {
		mux.Handle(atollv1connect.NewDemoServiceHandler(demoService{o.Demo}, opts...))
	}
}

// refusePages refuses what a browser sends for a page of another origin, also by
// GET, and what reaches a loopback address under a foreign host name.
func refusePages(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		site := r.Header.Get("Sec-Fetch-Site")
		foreign := site != "" && site != "none" && site != "same-origin" || r.Header.Get("Origin") != ""
		if foreign || !ownName(r) {
			http.Error(w, "not for pages of a browser", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// ownName reports whether a request that came over loopback names a loopback
// host, so that a foreign name that was made to point there is of no use.
func ownName(r *http.Request) bool {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	tcp, _ := addr.(*net.TCPAddr)
	if tcp == nil || !tcp.IP.IsLoopback() {
		return true
	}
	name := r.Host
	if h, _, err := net.SplitHostPort(name); err == nil {
		name = h
	}
	ip := net.ParseIP(strings.Trim(name, "[]"))
	return name == "" || name == "localhost" || ip != nil
}

// The longest that calls may take: those that read or copy a whole volume, and
// all others.
const (
	longCall  = 24 * time.Hour
	otherCall = 10 * time.Minute
)

// limitOf bounds a call.
func limitOf(procedure string) time.Duration {
	switch procedure {
	case atollv1connect.VolumeServiceCheckVolumeProcedure, atollv1connect.VersionServiceDiffProcedure,
		atollv1connect.VersionServiceListVersionsProcedure:
		return longCall
	}
	return otherCall
}

// serverInterceptor turns our errors into Connect's, bounds every call, asks
// whether its caller may make it, and notes which were passed on by another
// server.
type serverInterceptor struct {
	log    *slog.Logger
	rights Rights
}

func (i serverInterceptor) begin(ctx context.Context, s connect.Spec, h http.Header) (context.Context, context.CancelFunc) {
	if h.Get(headerForwarded) != "" {
		ctx = Forwarding(ctx)
	}
	return context.WithTimeout(ctx, limitOf(s.Procedure))
}

func (i serverInterceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, cancel := i.begin(ctx, req.Spec(), req.Header())
		defer cancel()
		who := CallerOf(ctx)
		if !who.Root {
			if err := i.rights.Authorize(ctx, who, req.Any()); err != nil {
				return nil, toConnect(err)
			}
		}
		resp, err := next(ctx, req)
		if err == nil && !who.Root {
			err = i.rights.Conceal(ctx, who, resp.Any())
		}
		if err != nil {
			return nil, toConnect(err)
		}
		return resp, nil
	}
}

func (i serverInterceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i serverInterceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		ctx, cancel := i.begin(ctx, conn.Spec(), conn.RequestHeader())
		defer cancel()
		if who := CallerOf(ctx); !who.Root {
			conn = &authorizedConn{conn, ctx, i.rights, who}
		}
		return toConnect(next(ctx, conn))
	}
}

// authorizedConn is a stream whose requests are authorized as they come.
type authorizedConn struct {
	connect.StreamingHandlerConn
	ctx    context.Context // of the call
	rights Rights
	who    Caller
}

// Receive implements connect.StreamingHandlerConn.
func (c *authorizedConn) Receive(msg any) error {
	if err := c.StreamingHandlerConn.Receive(msg); err != nil {
		return err
	}
	return toConnect(c.rights.Authorize(c.ctx, c.who, msg))
}

func reply[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}
