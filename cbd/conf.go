package cbd

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// conf is what is read from client.conf.
type conf struct {
	servers            []string
	timeout, ioTimeout time.Duration
	precise, writeback bool
	token              string
	tls                *tls.Config // of calls; nil: the system's authorities
	dataTLS            *tls.Config // of reads and writes, with the certificate to show
}

// readConf reads a client.conf.
func readConf(path string) (*conf, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	keys := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && !strings.HasPrefix(key, "#") {
			keys[strings.TrimSpace(key)] = strings.TrimSpace(value)
		}
	}
	c := &conf{precise: yes(keys["atoll.preciseOpen"]), writeback: yes(keys["atoll.writeback"]), token: keys["atoll.token"]}
	if c.token == "" {
		c.token = os.Getenv("ATOLL_TOKEN")
	}
	for addr := range strings.SplitSeq(keys["mds.listen.addr"], ",") {
		if addr = strings.TrimSpace(addr); addr == "" {
			continue
		}
		if err := checkServer(addr); err != nil {
			return nil, err
		}
		c.servers = append(c.servers, addr)
	}
	if len(c.servers) == 0 {
		return nil, fmt.Errorf("mds.listen.addr is missing")
	}
	if c.timeout, err = milliseconds(keys["atoll.timeoutMS"], 20*time.Second); err != nil {
		return nil, err
	}
	if c.ioTimeout, err = milliseconds(keys["atoll.ioTimeoutMS"], 45*time.Second); err != nil {
		return nil, err
	}
	if file := keys["atoll.caFile"]; file != "" {
		if c.tls, err = trust(file); err != nil {
			return nil, err
		}
	}
	c.dataTLS = c.tls
	if cert := keys["atoll.certFile"]; cert != "" {
		c.dataTLS = show(c.tls, cert, keys["atoll.keyFile"])
	}
	return c, nil
}

func yes(value string) bool {
	switch strings.ToLower(value) {
	case "1", "true", "yes", "on":
		return true
	}
	return false
}

func milliseconds(value string, def time.Duration) (time.Duration, error) {
	if value == "" {
		return def, nil
	}
	ms, err := strconv.ParseFloat(value, 64)
	if err != nil {
		return 0, fmt.Errorf("%q: want milliseconds", value)
	}
	return max(50*time.Millisecond, time.Duration(ms*float64(time.Millisecond))), nil
}

// checkServer refuses what is no address of a server.
func checkServer(addr string) error {
	if strings.HasPrefix(addr, "unix:") {
		return nil
	}
	hostport := addr
	if u, err := url.Parse(addr); err == nil && u.Host != "" {
		if u.Scheme != "http" && u.Scheme != "https" {
			return fmt.Errorf("address %q: want http or https", addr)
		}
		hostport = u.Host
	}
	if host, port, err := net.SplitHostPort(hostport); err != nil || host == "" || port == "" {
		return fmt.Errorf("address %q: want HOST:PORT", addr)
	}
	return nil
}

// trust returns settings that trust the authorities in a file.
func trust(file string) (*tls.Config, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// show adds a certificate to settings. Its files are read for each connection,
// so that it can be renewed; without a key file the first holds the key, too.
func show(base *tls.Config, certFile, keyFile string) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if base != nil {
		c = base.Clone()
	}
	if keyFile == "" {
		keyFile = certFile
	}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(certFile, keyFile)
		return &pair, err
	}
	return c
}
