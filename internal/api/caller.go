package api

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1/atollv1connect"
)

// Caller is who makes a call. The zero Caller is nobody.
type Caller struct {
	Name string
	Root bool // may do anything
}

type callerKey struct{}

// CallerOf returns who makes the call that ctx belongs to.
func CallerOf(ctx context.Context) Caller {
	who, _ := ctx.Value(callerKey{}).(Caller)
	return who
}

// Credential is what a client shows: the server's token, which is root's, or the
// name and password of a user. The zero Credential shows nothing.
type Credential struct {
	Token          string
	User, Password string
}

// set adds the credential to a request. A user goes before a token, so that a
// token of the environment does not make root of one who said who he is.
func (c Credential) set(h http.Header) {
	switch {
	case c.User != "":
		r := http.Request{Header: h}
		r.SetBasicAuth(c.User, c.Password)
	case c.Token != "":
		h.Set("Authorization", bearer+c.Token)
	}
}

const bearer = "Bearer "

// loginTime bounds the check of a password, which may wait for others.
const loginTime = 15 * time.Second

// identify finds out who calls, the one place where that is done:
//
//   - a user, by name and password;
//   - else root: on the Unix socket, whose directory only the server's user can
//     enter, whoever says nothing; on TCP who shows the token, and members of the
//     cluster, which showed their certificate (the listener verified it) and which
//     have authorized what they pass on;
//   - nobody, for what needs no credential: /healthz, /metrics, and the call to
//     join, which carries a token of its own.
//
// All others are refused.
func identify(o Options, local bool, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := callerOf(o, local, r)
		open := r.URL.Path == "/healthz" || r.URL.Path == "/metrics" || r.URL.Path == atollv1connect.ClusterServiceJoinProcedure
		if err != nil && !open {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("WWW-Authenticate", "Bearer")
			w.WriteHeader(http.StatusUnauthorized)
			_ = json.NewEncoder(w).Encode(map[string]string{"code": "unauthenticated", "message": err.Error()})
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, who)))
	})
}

func callerOf(o Options, local bool, r *http.Request) (Caller, error) {
	if name, password, ok := r.BasicAuth(); ok {
		ctx, cancel := context.WithTimeout(r.Context(), loginTime)
		defer cancel()
		return o.Backend.Login(ctx, name, password)
	}
	root := Caller{Name: "root", Root: true}
	if local || r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		return root, nil
	}
	got, ok := strings.CutPrefix(r.Header.Get("Authorization"), bearer)
	if ok && o.Token != "" && subtle.ConstantTimeCompare([]byte(got), []byte(o.Token)) == 1 {
		return root, nil
	}
	return Caller{}, errNoCredential
}

// errNoCredential tells what is missing.
var errNoCredential = errors.New("this address needs the token from the server's credential file in the header Authorization: Bearer TOKEN, or a user's name and password")
