package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/host"
)

// serveNBD opens the NBD gateway on TCP and a Unix socket.
func (s *Server) serveNBD(context.Context, context.Context) error {
	if !s.cfg.has("gateway") {
		return nil
	}
	listeners, err := nbd.InheritedListeners()
	if err != nil {
		return err
	}
	listen := func(addr string) error {
		l, err := host.TCP{}.Listen(addr)
		if err != nil {
			for _, open := range listeners {
				err = errors.Join(err, open.Close())
			}
			return api.WithHint(fmt.Errorf("nbd: %w", err), "is another server running? --nbd HOST:PORT chooses another address, --nbd none does without")
		}
		listeners = append(listeners, l)
		return nil
	}
	if len(listeners) == 0 && s.nbdTCP() != "" {
		if err := listen(s.nbdTCP()); err != nil {
			return err
		}
		s.nbdAddr = listeners[0].Addr().String()
	}
	if err := listen("unix:" + s.nbdSocket()); err != nil {
		return err
	}
	o := nbd.Options{Listeners: listeners, Exports: s.volumes, PlainUnix: true, DrainTimeout: 3 * time.Second, Log: s.log, Metrics: s.metrics.nbd,
		MaxBytes: max(32<<20, s.cfg.Memory/16)}
	if s.cfg.TLSCert != "" {
		if o.TLS, err = serverTLS(s.cfg); err != nil {
			return err
		}
		o.TLSMode = nbd.TLSRequired
	}
	s.nbd = nbd.Serve(o)
	s.onStop(s.nbd.Close)
	return nil
}

func (s *Server) nbdSocket() string {
	if s.cfg.NBDSocket != "" {
		return s.cfg.NBDSocket
	}
	return s.home.path("nbd.sock")
}

// serveAPI opens the control API.
func (s *Server) serveAPI(context.Context, context.Context) error {
	b := &backend{s: s}
	o := api.Options{Backend: b, Token: s.home.token, Log: s.log, Mounts: s.mounts(b),
		Metrics: promhttp.HandlerFor(s.reg, promhttp.HandlerOpts{})}
	if s.opts.Faults {
		o.Demo = b
	}
	tcp, unix := api.NewHandlers(o)
	l, err := host.TCP{}.Listen(s.cfg.Listen)
	if err != nil {
		return api.WithHint(fmt.Errorf("api: %w", err), "is another server running? --listen HOST:PORT chooses another address")
	}
	s.apiAddr = l.Addr().String()
	s.serveHTTP(newMixedListener(l, s.home.identity.OpenTLS(), loopback(s.cfg.Listen)), tcp)
	sockets := []string{s.Socket()}
	if err := os.MkdirAll(api.RuntimeDir(), 0o700); err == nil && api.CheckPrivate(api.RuntimeDir()) == nil {
		sockets = append(sockets, api.DefaultSocket())
	}
	for i, path := range sockets {
		l, err := host.TCP{}.Listen("unix:" + path)
		if err != nil && i > 0 {
			s.log.Info("default socket is taken by another server; this one is reached by its own", "socket", path, "own", s.Socket())
			continue
		}
		if err != nil {
			return fmt.Errorf("api: %w", err)
		}
		s.serveHTTP(l, unix)
	}
	return nil
}

// serveHTTP serves h on l until Stop.
func (s *Server) serveHTTP(l net.Listener, h http.Handler) {
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.https = append(s.https, srv)
	s.wg.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.fail(fmt.Errorf("serve api on %v: %w", l.Addr(), err))
		}
	})
	s.onStop(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			return srv.Close()
		}
		return nil
	})
}
