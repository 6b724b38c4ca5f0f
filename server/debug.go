package server

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"
)

// startDebug serves profiles when an address is set for them. The handlers are
// put on a mux of their own: importing net/http/pprof for its side effect would
// put them on every default mux of the process.
func (s *Server) startDebug() error {
	if s.c.DebugAddr == "" {
		return nil
	}
	lis, err := net.Listen("tcp", s.c.DebugAddr)
	if err != nil {
		return fmt.Errorf("listen for profiles (--debug-addr): %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	s.debug = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	s.serving.Go(func() {
		if err := s.debug.Serve(lis); err != nil && !errors.Is(err, http.ErrServerClosed) {
			s.log.Warn("profiles are not served any more", "err", err)
		}
	})
	s.log.Info("serving profiles", "event", "serving_profiles", "addr", lis.Addr().String())
	return nil
}
