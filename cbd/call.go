package cbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// question is the body of a call.
type question struct {
	Owner    string `json:"owner"`
	Password string `json:"password"`

	Path        string `json:"path,omitempty"`
	NewPath     string `json:"new_path,omitempty"`
	NewOwner    string `json:"new_owner,omitempty"`
	Length      uint64 `json:"length,omitempty"`
	Poolset     string `json:"poolset,omitempty"`
	StripeUnit  uint64 `json:"stripe_unit,omitempty"`
	StripeCount uint64 `json:"stripe_count,omitempty"`
	FileID      uint64 `json:"file_id,omitempty"`
	Session     string `json:"session,omitempty"`
	Precise     bool   `json:"precise,omitempty"`
}

// answer is the body of a call's answer.
type answer struct {
	Code     int        `json:"code"`
	Message  string     `json:"message"`
	Session  string     `json:"session"`
	URLs     []string   `json:"urls"`
	Length   int64      `json:"length"`
	File     FileInfo   `json:"file"`
	Files    []FileInfo `json:"files"`
	Cluster  string     `json:"cluster"`
	Poolsets []string   `json:"poolsets"`
}

// servers asks the servers of a cluster.
type servers struct {
	c    *conf
	http *http.Client
}

func newServers(c *conf) *servers {
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	tr := &http.Transport{TLSClientConfig: c.tls, MaxIdleConnsPerHost: 16, IdleConnTimeout: 30 * time.Second}
	tr.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		// The host of a Unix socket's address is its place in the list.
		for i, s := range c.servers {
			if path, ok := strings.CutPrefix(s, "unix:"); ok && addr == fmt.Sprintf("unix-%d:80", i) {
				return dialer.DialContext(ctx, "unix", path)
			}
		}
		return dialer.DialContext(ctx, network, addr)
	}
	return &servers{c: c, http: &http.Client{Transport: tr}}
}

func (s *servers) close() { s.http.CloseIdleConnections() }

// base returns the start of the URLs of a server.
func (s *servers) base(i int) string {
	addr := s.c.servers[i]
	switch {
	case strings.HasPrefix(addr, "unix:"):
		return fmt.Sprintf("http://unix-%d", i)
	case strings.Contains(addr, "://"):
		return strings.TrimSuffix(addr, "/")
	case s.c.tls != nil:
		return "https://" + addr
	}
	return "http://" + addr
}

// repeatable reports whether a call may be sent again when its answer was lost.
func repeatable(name string) bool {
	switch name {
	case "open", "close", "stat", "listdir", "extend", "changeowner", "clusterid", "poolsets":
		return true
	}
	return false
}

// call asks whichever server answers first in order, until the deadline. Its
// errors are failures.
func (s *servers) call(name string, q question) (answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.c.timeout)
	defer cancel()
	body, err := json.Marshal(q)
	if err != nil {
		return answer{}, fail(ParamError, "%v", err)
	}
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		for i := range s.c.servers {
			var a answer
			if a, err = s.ask(ctx, i, name, body); err == nil {
				return a, nil
			}
			var f *failure
			var dial *net.OpError
			switch {
			case errors.As(err, &f):
				return a, f
			case ctx.Err() != nil:
				return a, fail(Failed, "no answer in time: %v", err)
			case !repeatable(name) && !(errors.As(err, &dial) && dial.Op == "dial"):
				return a, fail(Failed, "the answer was lost: %v", err)
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return answer{}, fail(Failed, "no answer in time: %v", err)
		}
	}
}

// ask asks one server. A failure is its answer; other errors mean that there was
// none.
func (s *servers) ask(ctx context.Context, i int, name string, body []byte) (a answer, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.base(i)+"/curve/v1/"+name, bytes.NewReader(body))
	if err != nil {
		return a, fail(Failed, "%v", err)
	}
	req.Header.Set("Content-Type", "application/json")
	if s.c.token != "" {
		req.Header.Set("Authorization", "Bearer "+s.c.token)
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return a, err
	}
	if resp.StatusCode != http.StatusOK {
		code := Failed
		if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
			code = AuthFail
		}
		return a, fail(code, "%s answers %s: %.200s", s.c.servers[i], resp.Status, text)
	}
	if err := json.Unmarshal(text, &a); err != nil {
		return a, fail(Failed, "%s answers nonsense: %v", s.c.servers[i], err)
	}
	if a.Code != 0 {
		return a, &failure{-a.Code, a.Message}
	}
	return a, nil
}
