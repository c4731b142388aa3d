package api

import (
	"context"
	"crypto/subtle"
	"fmt"
	"log/slog"
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
	Config(ctx context.Context) ([]*atollv1.Setting, error)
	Diagnose(ctx context.Context) ([]*atollv1.Finding, error)
	CreateToken(ctx context.Context, ttl time.Duration) (token string, expires time.Time, err error)
	Join(ctx context.Context, req *atollv1.JoinRequest) (*atollv1.JoinResponse, error)

	CreateVolume(ctx context.Context, req *atollv1.CreateVolumeRequest) (*atollv1.Volume, error)
	Volumes(ctx context.Context, after string, limit int) ([]*atollv1.Volume, error)
	Volume(ctx context.Context, name string, open bool) (*atollv1.Volume, error)
	ResizeVolume(ctx context.Context, name string, size int64, shrink bool) (*atollv1.Volume, error)
	DeleteVolume(ctx context.Context, name string, dryRun bool) (bytes int64, err error)
	CheckVolume(ctx context.Context, name string, readAll bool) (*atollv1.CheckVolumeResponse, error)

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
	Log     *slog.Logger
}

// NewHandlers returns the handler for TCP, which asks for the token, and the
// one for the Unix socket, which does not and also serves profiles.
func NewHandlers(o Options) (tcp, unix http.Handler) {
	mux := http.NewServeMux()
	opt := connect.WithInterceptors(serverInterceptor{o.Log})
	limit := connect.WithReadMaxBytes(1 << 20)
	path, h := atollv1connect.NewClusterServiceHandler(clusterService{o.Backend}, opt, limit)
	mux.Handle(path, h)
	path, h = atollv1connect.NewVolumeServiceHandler(volumeService{o.Backend}, opt, limit)
	mux.Handle(path, h)
	if o.Demo != nil {
		path, h = atollv1connect.NewDemoServiceHandler(demoService{o.Demo}, opt, limit)
		mux.Handle(path, h)
	}
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
	private := http.NewServeMux()
	private.Handle("/", mux)
	private.HandleFunc("/debug/pprof/", pprof.Index)
	private.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	private.HandleFunc("/debug/pprof/profile", pprof.Profile)
	private.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	private.HandleFunc("/debug/pprof/trace", pprof.Trace)
	guarded := http.NewCrossOriginProtection().Handler(mux)
	return requireToken(o.Token, guarded), private
}

// requireToken lets through /healthz, /metrics, the call to join (which carries
// a token of its own) and whatever shows the bearer token.
func requireToken(token string, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		open := r.URL.Path == "/healthz" || r.URL.Path == "/metrics" ||
			r.URL.Path == atollv1connect.ClusterServiceJoinProcedure
		got, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !open && (!ok || token == "" || subtle.ConstantTimeCompare([]byte(got), []byte(token)) != 1) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("WWW-Authenticate", "Bearer")
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintln(w, `{"code":"unauthenticated","message":"this address needs the token from the server's credential file in the header Authorization: Bearer TOKEN"}`)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// The longest that calls may take: one that reads a whole volume, and all others.
const (
	longCall  = 24 * time.Hour
	otherCall = 10 * time.Minute
)

// serverInterceptor turns our errors into Connect's and bounds every call.
type serverInterceptor struct{ log *slog.Logger }

func (i serverInterceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (resp connect.AnyResponse, err error) {
		most := otherCall
		if req.Spec().Procedure == atollv1connect.VolumeServiceCheckVolumeProcedure {
			most = longCall
		}
		ctx, cancel := context.WithTimeout(ctx, most)
		defer cancel()
		resp, err = next(ctx, req)
		return resp, toConnect(err)
	}
}

func (i serverInterceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i serverInterceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func reply[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}
